// Sixteen numbers at a time, as AVX-512 with VNNI or AVX2 with FMA and F16C have them. kernels.cpp is written in these words.

#pragma once

#include <algorithm>
#include <cstdint>
#ifdef __x86_64__  // elsewhere the #error below shall be the first
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SIXTEEN_WIDE
constexpr int FLOAT_ROWS = 14, INTEGER_ROWS = 12;  // rows of a tile: as many as there are registers for

struct Floats { __m512 v; };
struct Integers { __m512i v; };
struct Bytes { __m512i v; };

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store_half(uint16_t* p, Floats x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats divide(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats whole(Floats a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline Floats power_of_two(Floats whole_number) {  // 2 ** x for whole x from -126 to 127
    return {_mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_add_epi32(_mm512_cvtps_epi32(whole_number.v), _mm512_set1_epi32(127)), 23))};
}
inline Integers splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Floats to_floats(Integers x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm512_srli_epi16(x.v, 4)}); }
// VNNI multiplies unsigned by signed, so weights of int8 are packed moved up by 128 (`INT8_OFFSET`), which the start value
// of the sum takes back.
constexpr int INT8_OFFSET = 128;
// In words of its own because g++ 12 loads the four bytes apart and copies the sum: three instructions where one does.
inline void add_products(Integers& acc, Bytes w, const int32_t* four) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*four));
}
inline void add_int8_products(Integers& acc, Bytes w, const int32_t* four) { add_products(acc, w, four); }
inline void store_int8(int8_t* p, Floats x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int FLOAT_ROWS = 5, INTEGER_ROWS = 4;

struct Floats { __m256 a, b; };
struct Integers { __m256i a, b; };
struct Bytes { __m256i a, b; };

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline void store_half(uint16_t* p, Floats x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats multiply(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats divide(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats magnitude(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats whole(Floats x) { return {_mm256_round_ps(x.a, 0), _mm256_round_ps(x.b, 0)}; }
inline float sum(Floats x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(x.a, x.b));
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}
inline float largest(Floats x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_max_ps(x.a, x.b));
    return *std::max_element(lanes, lanes + 8);
}
inline Floats power_of_two(Floats x) {
    const __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.a), bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.b), bias), 23))};
}
inline Integers splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats to_floats(Integers x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline Bytes low_nibbles(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
// Without VNNI the pairwise sums are 16 bits wide: moved up by 128 they would overflow. So signs are moved instead.
constexpr int INT8_OFFSET = 0;
inline __m256i dot8(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes) {
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline void add_products(Integers& acc, Bytes w, const int32_t* four) {
    const __m256i x = _mm256_set1_epi32(*four);
    acc = {dot8(acc.a, w.a, x), dot8(acc.b, w.b, x)};
}
inline void add_int8_products(Integers& acc, Bytes w, const int32_t* four) {
    const __m256i x = _mm256_set1_epi32(*four), size = _mm256_abs_epi8(x);
    acc = {dot8(acc.a, size, _mm256_sign_epi8(w.a, x)), dot8(acc.b, size, _mm256_sign_epi8(w.b, x))};
}
inline void store_int8(int8_t* p, Floats x) {
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
#error "needs AVX-512 with VNNI, or AVX2 with FMA and F16C"
#endif

// e ** x, relative error below 2e-7 (Cephes' expf: range reduction and a polynomial of degree 5).
inline Floats exponential(Floats x) {
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const Floats n = whole(multiply(x, splat(1.44269504f)));
    x = fma(n, splat(-0.693359375f), x);
    x = fma(n, splat(2.12194440e-4f), x);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, x, splat(1.3981999507e-3f));
    p = fma(p, x, splat(8.3334519073e-3f));
    p = fma(p, x, splat(4.1665795894e-2f));
    p = fma(p, x, splat(1.6666665459e-1f));
    p = fma(p, x, splat(5.0000001201e-1f));
    p = fma(multiply(p, x), x, add(x, splat(1.0f)));
    return multiply(p, power_of_two(n));
}

}  // namespace
