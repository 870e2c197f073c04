/* Dot products of int8 rows with one int16 query. Plain C: the compiler makes vector instructions of the inner loop.

   rows x width codes, one scale a row; out[row] = factor * scales[row] * (codes[row] . query).
   The caller keeps |codes[row]| * |query| below 2^31, so that no sum overflows. */
#include <stdint.h>

void scan(const int8_t *restrict codes, const int16_t *restrict query, const float *restrict scales, int64_t rows,
          int64_t width, float factor, float *restrict out)
{
    for (int64_t row = 0; row < rows; row++) {
        const int8_t *code = codes + row * width;
        int32_t sum = 0;
        for (int64_t i = 0; i < width; i++)
            sum += (int32_t)code[i] * query[i];
        out[row] = factor * scales[row] * (float)sum;
    }
}
