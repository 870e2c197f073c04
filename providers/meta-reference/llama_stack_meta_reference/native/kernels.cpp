// One step of a Llama network on a CPU: every layer in one call, so that nothing but arithmetic is left between tokens.
//
// Compiled on the machine it runs on (library.py), for the widest vectors that it has (lanes.h). Weights lie in panels of 16 output channels, in the order in which they are read. They are float32,
// float16, int8 (groups of 64 inputs) or int4 (groups of 32), each group with a float16 scale; with the integer types
// the activations are rounded to int8 too, per row and group, so that no row of a batch can disturb another.
//
// Names: N new tokens of all sequences, M rows of a tile, K head width, G key/value heads, R query heads per key/value
// head. A "row" is one token's activations. Buffers belong to the caller, except scratch, which belongs to the network.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <sched.h>
#include <vector>

#include "lanes.h"

namespace {

constexpr int PANEL = 16;         // output channels side by side
constexpr int INPUT_MULTIPLE = 64;  // inputs are padded with zeros up to a multiple of this
constexpr int BLOCK = 16;         // tokens in a cache block
constexpr size_t TILE_BYTES = 384 << 10;  // of activations that are reused while panels stream by: fits a level 2 cache
constexpr size_t AHEAD_BYTES = 2048;      // how far before they are read weights are asked for

enum Kind { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, INT4 = 3 };

int group_of(int kind) { return kind == INT4 ? 32 : 64; }

// Bytes of one panel for `inputs` (padded) inputs.
size_t panel_bytes(int kind, int inputs) {
    switch (kind) {
        case FLOAT32: return size_t(inputs) * PANEL * 4;
        case FLOAT16: return size_t(inputs) * PANEL * 2;
        case INT8: return size_t(inputs) / 64 * (PANEL * 2 + 64 * PANEL);
        default: return size_t(inputs) / 32 * (PANEL * 2 + 16 * PANEL);
    }
}

// Bytes of a panel, its scales included, for each vector of weights that is read.
size_t vector_bytes(int kind) {
    switch (kind) {
        case FLOAT32: return PANEL * 4;
        case FLOAT16: return PANEL * 2;
        case INT8: return panel_bytes(kind, 64) / 16;
        default: return panel_bytes(kind, 32) / 4;
    }
}

int padded(int inputs) { return (inputs + INPUT_MULTIPLE - 1) / INPUT_MULTIPLE * INPUT_MULTIPLE; }

// ---- Threads -----------------------------------------------------------------------------------------------------

// The threads of one step. They meet some ten times a layer, far more often than OpenMP's barriers are made for: those put
// threads to sleep as soon as the process has more of them than the machine has cores.
class Team {
public:
    int threads = 1;  // as many as there really are: set before any of them meet

    // Return when all have come.
    void meet() {
        if (threads == 1) return;
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
            if (spins < 100) _mm_pause();
            else sched_yield();  // soon: the others may have no core to run on but ours
    }

    // Call work(i) for this thread's share of the numbers below count, then meet.
    template <typename Work>
    void share(int count, int own, Work work) {
        const int first = int(int64_t(count) * own / threads), last = int(int64_t(count) * (own + 1) / threads);
        for (int i = first; i < last; ++i) work(i);
        meet();
    }

private:
    std::atomic<int> arrived_{0}, phase_{0};
};

// ---- Activations, packed for the kernels -------------------------------------------------------------------------

// Rows in tiles of M side by side: float32 as [tile][input][M]; int8 as [tile][input / 4][M][4], with a scale and the
// start value of the integer sum for each [tile][group][M].
struct Packed {
    int kind, rows, inputs;  // inputs are padded
    float* floats;
    int8_t* bytes;
    float* scales;
    int32_t* starts;

    bool is_integer() const { return kind >= INT8; }
    int tile_rows() const { return is_integer() ? INTEGER_ROWS : FLOAT_ROWS; }
    int rows_of(int tile) const { return std::min(tile_rows(), rows - tile * tile_rows()); }
    size_t offset(int tile) const { return size_t(tile) * tile_rows() * inputs; }
    size_t group_offset(int tile) const { return size_t(tile) * tile_rows() * (inputs / group_of(kind)); }
};

// Put one row, `width` numbers long, padded with zeros to a.inputs, into its place. `row_values` has room for padding.
void pack_row(const Packed& a, int row, float* values, int width) {
    std::fill(values + width, values + a.inputs, 0.0f);
    const int tile = row / a.tile_rows(), place = row % a.tile_rows(), m = a.rows_of(tile);
    if (!a.is_integer()) {
        float* target = a.floats + a.offset(tile) + place;
        for (int i = 0; i < a.inputs; ++i) target[size_t(i) * m] = values[i];
        return;
    }
    const int group = group_of(a.kind), offset = a.kind == INT4 ? 8 : INT8_OFFSET;
    int8_t* target = a.bytes + a.offset(tile) + place * 4;
    alignas(64) int8_t rounded[64];
    for (int g = 0; g < a.inputs / group; ++g) {
        const float* x = values + g * group;
        Floats most = zero(), total = zero();
        for (int i = 0; i < group; i += 16) {
            most = larger(most, magnitude(load(x + i)));
            total = add(total, load(x + i));
        }
        const float peak = largest(most), inverse = peak > 0 ? 127.0f / peak : 0.0f;
        int32_t all = 0;
        for (int i = 0; i < group; i += 16) store_int8(rounded + i, multiply(load(x + i), splat(inverse)));
        for (int i = 0; i < group; ++i) all += rounded[i];
        for (int i = 0; i < group; i += 4) std::memcpy(target + size_t(g * group + i) / 4 * m * 4, rounded + i, 4);
        const size_t at = a.group_offset(tile) + size_t(g) * m + place;
        // What is not a number must stay none: rounding would hide it.
        a.scales[at] = std::isfinite(sum(total)) ? peak / 127.0f : NAN;
        a.starts[at] = -offset * all;
    }
}

// ---- Matrix products ---------------------------------------------------------------------------------------------

struct Matrix {
    int kind, outputs, inputs;  // as they are, without padding
    const uint8_t* panels;
};

// What a tile asks the memory for while it computes: every `pace` bytes from `from` on, once for each vector of weights.
struct Ahead {
    const uint8_t* from;
    size_t pace;

    void ask() {
        _mm_prefetch((const char*)from, _MM_HINT_T0);
        from += pace;
    }
};

// The products of M rows with one panel over inputs [from, to), added to what `out` holds or, if is_first, replacing it.
template <int M, bool HALF>
void float_tile(const float* a, const uint8_t* panel, int from, int to, float* out, size_t stride, bool is_first,
                Ahead ahead) {
    Floats acc[M];
    for (int r = 0; r < M; ++r) acc[r] = is_first ? zero() : load(out + r * stride);
    const float* x = a + size_t(from) * M;
    for (int i = from; i < to; ++i, x += M) {
        const Floats w = HALF ? load_half((const uint16_t*)panel + size_t(i) * PANEL)
                              : load((const float*)panel + size_t(i) * PANEL);
        ahead.ask();
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) acc[r] = fma(splat(x[r]), w, acc[r]);
    }
    for (int r = 0; r < M; ++r) store(out + r * stride, acc[r]);
}

template <int M, bool FOUR>
void integer_tile(const Packed& p, int tile, const uint8_t* panel, int from, int to, float* out, size_t stride,
                  bool is_first, Ahead ahead) {
    constexpr int GROUP = FOUR ? 32 : 64, GROUP_BYTES = PANEL * 2 + (FOUR ? 16 : 64) * PANEL;
    Floats acc[M];
    for (int r = 0; r < M; ++r) acc[r] = is_first ? zero() : load(out + r * stride);
    const float* scales = p.scales + p.group_offset(tile);
    const int32_t* starts = p.starts + p.group_offset(tile);
    const int32_t* x = (const int32_t*)(p.bytes + p.offset(tile)) + size_t(from) / 4 * M;
    for (int g = from / GROUP; g < to / GROUP; ++g) {
        const uint8_t* w = panel + size_t(g) * GROUP_BYTES;
        const Floats w_scale = load_half((const uint16_t*)w);
        w += PANEL * 2;
        Integers sums[M];
        for (int r = 0; r < M; ++r) sums[r] = splat(starts[g * M + r]);
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i += FOUR ? 8 : 4, w += 64) {
            ahead.ask();
            const Bytes bytes = load_bytes(w);
            if constexpr (FOUR) {
                const Bytes low = low_nibbles(bytes), high = high_nibbles(bytes);
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) add_products(sums[r], low, x + r);
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) add_products(sums[r], high, x + M + r);
                x += 2 * M;
            } else {
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) add_int8_products(sums[r], bytes, x + r);
                x += M;
            }
        }
        for (int r = 0; r < M; ++r)
            acc[r] = fma(to_floats(sums[r]), multiply(w_scale, splat(scales[g * M + r])), acc[r]);
    }
    for (int r = 0; r < M; ++r) store(out + r * stride, acc[r]);
}

template <int M>
void tile_product(const Packed& a, int tile, const Matrix& w, const uint8_t* panel, int from, int to, float* out,
                  size_t stride, bool is_first, Ahead ahead) {
    const float* floats = a.floats + a.offset(tile);
    switch (w.kind) {
        case FLOAT32: return float_tile<M, false>(floats, panel, from, to, out, stride, is_first, ahead);
        case FLOAT16: return float_tile<M, true>(floats, panel, from, to, out, stride, is_first, ahead);
        case INT8: return integer_tile<M, false>(a, tile, panel, from, to, out, stride, is_first, ahead);
        default: return integer_tile<M, true>(a, tile, panel, from, to, out, stride, is_first, ahead);
    }
}

using TileProduct = void (*)(const Packed&, int, const Matrix&, const uint8_t*, int, int, float*, size_t, bool, Ahead);
constexpr TileProduct TILE_PRODUCTS[] = {
    nullptr,          tile_product<1>, tile_product<2>, tile_product<3>,  tile_product<4>,
    tile_product<5>,
#ifdef SIXTEEN_WIDE
    tile_product<6>,  tile_product<7>, tile_product<8>, tile_product<9>,  tile_product<10>,
    tile_product<11>, tile_product<12>, tile_product<13>, tile_product<14>,
#endif
};

// out = a w^T, or out += a w^T where `adds`; (rows, stride) with room for padded outputs. Called by all threads of a
// team, each of which takes a part of the panels; the caller waits for the others.
void product(const Packed& a, const Matrix& w, float* out, size_t stride, bool adds, int own, int threads) {
    const int panels = (w.outputs + PANEL - 1) / PANEL;
    const int first = int(int64_t(panels) * own / threads), last = int(int64_t(panels) * (own + 1) / threads);
    const int m = a.tile_rows(), tiles = (a.rows + m - 1) / m, unit = a.is_integer() ? 1 : 4;
    // Few rows: one pass over each panel. Many: the inputs in parts, so that the rows' part stays in the cache.
    const size_t all_bytes = size_t(a.rows) * a.inputs * unit;
    const int part = all_bytes <= TILE_BYTES ? a.inputs : std::min(a.inputs, 512);
    const int tiles_at_once = std::max(1, int(TILE_BYTES / (size_t(m) * part * unit)));
    const size_t next = panel_bytes(w.kind, padded(w.inputs)), line = vector_bytes(w.kind);
    for (int t0 = 0; t0 < tiles; t0 += tiles_at_once)
        for (int from = 0; from < a.inputs; from += part)
            for (int panel = first; panel < last; ++panel) {
                const uint8_t* weights = w.panels + panel * next;
                const int to = std::min(a.inputs, from + part), end = std::min(tiles, t0 + tiles_at_once);
                const size_t begin = next * from / a.inputs, share = next * (to - from) / a.inputs / (end - t0);
                for (int t = t0; t < end; ++t) {
                    // A tile by itself reads weights as fast as they come. Of several the first alone would wait for them
                    // while the memory rests with the others: so each asks for its part of the next panel.
                    const Ahead ahead = end - t0 == 1 ? Ahead{weights + begin + AHEAD_BYTES, line}
                                                      : Ahead{weights + next + begin + (t - t0) * share, line / (end - t0)};
                    TILE_PRODUCTS[a.rows_of(t)](a, t, w, weights, from, to,
                                                out + size_t(t) * m * stride + size_t(panel) * PANEL, stride,
                                                !adds && from == 0, ahead);
                }
            }
}

// ---- Attention over a paged cache ----------------------------------------------------------------------------------

constexpr int QUERIES = 8;        // query rows at a time, at most: each key and value is loaded once for all of them
constexpr int SPAN = 32 * BLOCK;  // keys between two updates of the running softmax (Milakov & Gimelshein 2018)
constexpr int BLOCKS_AHEAD = 2;   // so many blocks before they are read they are asked for: they may lie in any order
constexpr float HIDDEN = -1e30f;  // the score of what a row does not see; finite, so that what is not stands out

int lanes_of(int width) { return (width + 15) / 16 * 16; }

// Keys of a block lie as [K][16 tokens], values as [16 tokens][K], with K padded by zeros to whole vectors; the blocks of
// one head lie side by side. Numbers are float32, or float16 where is_half.
struct Cache {
    uint8_t *keys, *values;
    int blocks, width, lanes;
    bool is_half;

    size_t bytes() const { return is_half ? 2 : 4; }
    size_t at(int block, int head) const { return (size_t(head) * blocks + block) * lanes * BLOCK * bytes(); }
    void put(uint8_t* base, size_t place, float number) const {
        if (is_half) ((uint16_t*)base)[place] = _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT);
        else ((float*)base)[place] = number;
    }
};

template <bool HALF>
inline Floats load_cached(const uint8_t* base, size_t place) {
    return HALF ? load_half((const uint16_t*)base + place) : load((const float*)base + place);
}

inline void ask(const uint8_t* from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) _mm_prefetch((const char*)(from + at), _MM_HINT_T0);
}

// outs[i][k..] += weights[i][t] * values[t][k..] over the tokens of a span, for C vectors of k at a time.
template <int Q, int C, bool HALF>
void add_values(const Cache& cache, const int32_t* table, int head, int tokens, const float (*weights)[SPAN + 4 * BLOCK],
                int k, float* const* outs) {
    Floats acc[Q][C];
    for (int i = 0; i < Q; ++i)
        for (int c = 0; c < C; ++c) acc[i][c] = load(outs[i] + k + c * 16);
    constexpr size_t BYTES = HALF ? 2 : 4;
    const int last = (tokens - 1) / BLOCK;
    for (int s = 0; s < tokens; s += BLOCK) {
        const uint8_t* values = cache.values + cache.at(table[s / BLOCK], head);
        const uint8_t* later = cache.values + cache.at(table[std::min(s / BLOCK + BLOCKS_AHEAD, last)], head);
        const int inside = std::min(BLOCK, tokens - s);
        for (int t = 0; t < inside; ++t) {
            ask(later + (size_t(t) * cache.lanes + k) * BYTES, C * 16 * BYTES);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                const Floats value = load_cached<HALF>(values, size_t(t) * cache.lanes + k + c * 16);
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) acc[i][c] = fma(splat(weights[i][s + t]), value, acc[i][c]);
            }
        }
    }
    for (int i = 0; i < Q; ++i)
        for (int c = 0; c < C; ++c) store(outs[i] + k + c * 16, acc[i][c]);
}

// Attention of Q query rows, all of one key/value head: row i sees the first seen[i] tokens of `table`.
template <int Q, bool HALF>
void attend(const Cache& cache, const int32_t* table, int head, const float* const* queries, const int* seen,
            float* const* outs) {
    constexpr int AT_ONCE = Q >= 4 ? 1 : 4 / Q;  // blocks, so that there are sums enough to hide a sum's latency
    constexpr int VECTORS = Q == 8 ? 2 : 4;
    constexpr size_t KEY_BYTES = BLOCK * (HALF ? 2 : 4);  // of one k of a block's keys
    const int width = cache.width, lanes = cache.lanes;
    const int longest = *std::max_element(seen, seen + Q);
    alignas(64) float scores[Q][SPAN + 4 * BLOCK];
    alignas(64) float packed[256 * Q];
    float peak[Q], total[Q];
    for (int i = 0; i < Q; ++i) {
        peak[i] = HIDDEN, total[i] = 0;
        for (int k = 0; k < width; ++k) packed[k * Q + i] = queries[i][k];
        std::fill(outs[i], outs[i] + lanes, 0.0f);
    }
    for (int from = 0; from < longest; from += SPAN) {
        const int32_t* span = table + from / BLOCK;
        const int tokens = std::min(SPAN, longest - from), blocks = (tokens + BLOCK - 1) / BLOCK;
        for (int first = 0; first < blocks; first += AT_ONCE) {
            const uint8_t *keys[AT_ONCE], *later[AT_ONCE];
            for (int b = 0; b < AT_ONCE; ++b) {
                const int ahead = first + b + std::max(AT_ONCE, BLOCKS_AHEAD);
                keys[b] = cache.keys + cache.at(span[std::min(first + b, blocks - 1)], head);
                // After the last keys come the first values.
                later[b] = ahead < blocks ? cache.keys + cache.at(span[ahead], head)
                                          : cache.values + cache.at(span[std::min(ahead - blocks, blocks - 1)], head);
            }
            Floats acc[AT_ONCE][Q];
            for (int b = 0; b < AT_ONCE; ++b)
                for (int i = 0; i < Q; ++i) acc[b][i] = zero();
            for (int k = 0; k < width; ++k) {
                if (k * KEY_BYTES % 64 == 0)
                    for (int b = 0; b < AT_ONCE; ++b) ask(later[b] + k * KEY_BYTES, 64);
#pragma GCC unroll 4
                for (int b = 0; b < AT_ONCE; ++b) {
                    const Floats key = load_cached<HALF>(keys[b], size_t(k) * BLOCK);
#pragma GCC unroll 8
                    for (int i = 0; i < Q; ++i) acc[b][i] = fma(splat(packed[k * Q + i]), key, acc[b][i]);
                }
            }
            for (int b = 0; b < AT_ONCE; ++b)
                for (int i = 0; i < Q; ++i) store(&scores[i][(first + b) * BLOCK], acc[b][i]);
        }
        for (int i = 0; i < Q; ++i) {
            float* score = scores[i];
            const int visible = std::clamp(seen[i] - from, 0, tokens), rounded = blocks * BLOCK;
            std::fill(score + visible, score + rounded, HIDDEN);
            Floats most = splat(HIDDEN), broken = zero();
            for (int s = 0; s < rounded; s += 16) {
                most = larger(most, load(score + s));
                broken = fma(load(score + s), zero(), broken);
            }
            const float before = peak[i];
            peak[i] = std::max(before, largest(most)) + sum(broken);  // not a number if any score is none
            const float kept = before == HIDDEN ? 0.0f : std::exp(before - peak[i]);
            for (int s = 0; s < rounded; s += 16)
                store(score + s, exponential(add(load(score + s), splat(-peak[i]))));
            // exponential() ends at e^-87, which is not nothing.
            std::fill(score + visible, score + rounded, 0.0f);
            Floats sums = zero();
            for (int s = 0; s < rounded; s += 16) sums = add(sums, load(score + s));
            total[i] = total[i] * kept + sum(sums) + sum(broken);
            for (int k = 0; k < lanes; k += 16) store(outs[i] + k, multiply(load(outs[i] + k), splat(kept)));
        }
        int k = 0;
        for (; k + VECTORS * 16 <= lanes; k += VECTORS * 16)
            add_values<Q, VECTORS, HALF>(cache, span, head, tokens, scores, k, outs);
        for (; k < lanes; k += 16) add_values<Q, 1, HALF>(cache, span, head, tokens, scores, k, outs);
    }
    for (int i = 0; i < Q; ++i) {
        const Floats inverse = splat(1.0f / total[i]);
        for (int k = 0; k < lanes; k += 16) store(outs[i] + k, multiply(load(outs[i] + k), inverse));
    }
}

// As many rows as there are, in the largest groups that there are kernels for.
template <bool HALF>
void attend_rows(const Cache& cache, const int32_t* table, int head, int count, const float* const* queries,
                 const int* seen, float* const* outs) {
    for (int i = 0; i < count;) {
        const int left = count - i;
        const int taken = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto kernel = taken == 8   ? attend<8, HALF>
                            : taken == 4 ? attend<4, HALF>
                            : taken == 2 ? attend<2, HALF>
                                         : attend<1, HALF>;
        kernel(cache, table, head, queries + i, seen + i, outs + i);
        i += taken;
    }
}

}  // namespace

// ---- What Python calls ---------------------------------------------------------------------------------------------

extern "C" {

struct Layer {
    const float *attention_norm, *ffn_norm;
    Matrix qkv, output, gate_up, down;  // wq, wk, wv stacked; wo; w1, w3 stacked, each padded to whole panels; w2
};

// What an adapter adds to a product (Hu et al. 2021): up^T (down^T x), down [inputs][rank], up [rank][outputs]. Null where
// it leaves the matrix alone.
struct LowRank {
    const float *down, *up;
};

enum Target { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, TARGETS };

struct Adapter {
    int rank;              // padded to a multiple of 16
    const LowRank* pairs;  // [layers][TARGETS]
};

struct Network {
    int layers, dim, query_heads, key_heads, head_width, ffn_dim, kind;
    float epsilon;
    const Layer* layer;
    const float* norm;
    Matrix head;  // from states to logits
    const float *cosine, *sine;  // [position][head_width / 2]
    uint8_t *keys, *values;      // [layer] ..., see Cache
    int64_t layer_bytes;         // of keys, and of values, in one layer
    int blocks, has_half_cache;
    float *x, *wide, *attended, *floats, *scales;  // scratch for rows_at_once rows
    float* low;                                    // [rows][3][low_rank], for adapters
    int low_rank;
    int8_t* bytes;
    int32_t* starts;
    int threads;
};

struct Work {
    int rows, sequences, sampled, table_width;
    const float* embedded;  // [rows][dim]
    const int32_t *start, *count, *tables, *sampled_rows;  // of sequences; tables: [sequences][table_width]
    const int32_t *position, *slot;                        // of rows; a slot is block * BLOCK + place in the block
    const Adapter* adapters;
    const int32_t* adapter;  // of rows: which of the adapters, or -1; null where no row has one
    float* logits;           // [sampled][padded outputs of the head]
};

int64_t packed_bytes(int kind, int outputs, int inputs) {
    return int64_t((outputs + PANEL - 1) / PANEL) * panel_bytes(kind, padded(inputs));
}

// Rows [0, outputs) of a float32 matrix into panels; `target` has packed_bytes.
void pack(int kind, const float* weights, int outputs, int inputs, uint8_t* target) {
    const int all = padded(inputs), group = group_of(kind), panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int panel = 0; panel < panels; ++panel) {
        uint8_t* out = target + size_t(panel) * panel_bytes(kind, all);
        auto weight = [&](int lane, int i) {
            const int row = panel * PANEL + lane;
            return row < outputs && i < inputs ? weights[size_t(row) * inputs + i] : 0.0f;
        };
        float lanes[PANEL];
        if (kind == FLOAT32 || kind == FLOAT16) {
            for (int i = 0; i < all; ++i) {
                for (int lane = 0; lane < PANEL; ++lane) lanes[lane] = weight(lane, i);
                if (kind == FLOAT32) store((float*)out + size_t(i) * PANEL, load(lanes));
                else store_half((uint16_t*)out + size_t(i) * PANEL, load(lanes));
            }
            continue;
        }
        const float steps = kind == INT8 ? 127.0f : 7.0f;
        for (int g = 0; g < all / group; ++g) {
            uint16_t* scales = (uint16_t*)out;
            for (int lane = 0; lane < PANEL; ++lane) {
                float peak = 0;
                for (int i = 0; i < group; ++i) {
                    const float w = weight(lane, g * group + i);
                    // int4 has one step more below zero than above: the largest weight takes it, whatever its sign.
                    if (std::fabs(w) > std::fabs(peak)) peak = w;
                }
                lanes[lane] = kind == INT8 ? std::fabs(peak) / steps : peak / -8.0f;
            }
            store_half(scales, load(lanes));
            store(lanes, load_half(scales));  // weights are rounded by the scale that is stored
            out += PANEL * 2;
            for (int i = 0; i < group; ++i)
                for (int lane = 0; lane < PANEL; ++lane) {
                    const float scaled = lanes[lane] == 0 ? 0 : weight(lane, g * group + i) / lanes[lane];
                    if (kind == INT8) {
                        out[(i / 4) * 64 + lane * 4 + i % 4] =
                            uint8_t(int(std::clamp(std::nearbyint(scaled), -127.0f, 127.0f)) + INT8_OFFSET);
                    } else {
                        const int code = int(std::clamp(std::nearbyint(scaled) + 8, 0.0f, 15.0f));
                        uint8_t& byte = out[(i / 8) * 64 + lane * 4 + i % 4];
                        byte = uint8_t(i % 8 < 4 ? code : byte | code << 4);
                    }
                }
            out += size_t(group) * PANEL / (kind == INT8 ? 1 : 2);
        }
    }
}

// out = values w^T by itself, for tests and for measuring; out is (rows, outputs padded to whole panels).
void product_of(int kind, const uint8_t* panels, int outputs, int inputs, const float* values, int rows, float* out,
                float* floats, int8_t* bytes, float* scales, int32_t* starts, int threads) {
    const Matrix w{kind, outputs, inputs, panels};
    const Packed a{kind, rows, padded(inputs), floats, bytes, scales, starts};
#pragma omp parallel num_threads(threads)
    {
        float* line = (float*)std::aligned_alloc(64, size_t(a.inputs) * 4);
#pragma omp for
        for (int r = 0; r < rows; ++r) {
            std::copy(values + size_t(r) * inputs, values + size_t(r + 1) * inputs, line);
            pack_row(a, r, line, inputs);
        }
        product(a, w, out, size_t((outputs + PANEL - 1) / PANEL) * PANEL, false, omp_get_thread_num(), omp_get_num_threads());
        std::free(line);
    }
}

// Run all layers over the new tokens, whose keys and values enter the cache, and write the logits that are wanted.
void step(const Network* net, const Work* work) {
    const int dim = net->dim, width = net->head_width, lanes = lanes_of(width), half = width / 2, rows = work->rows;
    const int H = net->query_heads, G = net->key_heads, R = H / G;
    const size_t x_stride = size_t(dim + PANEL - 1) / PANEL * PANEL;
    const int qkv_width = (H + 2 * G) * width, attended_width = H * width;
    const int ffn = (net->ffn_dim + PANEL - 1) / PANEL * PANEL;  // w1 and w3 begin at whole panels
    const size_t wide_stride = std::max(size_t(qkv_width + PANEL - 1) / PANEL * PANEL, size_t(ffn) * 2);
    const float scale = 1.0f / std::sqrt(float(width));
    const int line_floats = padded(std::max({dim, attended_width, ffn}));

    auto packed = [&](int count, int inputs) {
        return Packed{net->kind, count, padded(inputs), net->floats, net->bytes, net->scales, net->starts};
    };
    auto normalised = [&](const float* x, const float* weight, float* line) {
        float squares = 0;
        int i = 0;
        Floats total = zero();
        for (; i + 16 <= dim; i += 16) total = fma(load(x + i), load(x + i), total);
        for (squares = sum(total); i < dim; ++i) squares += x[i] * x[i];
        const float inverse = 1.0f / std::sqrt(squares / dim + net->epsilon);
        for (int j = 0; j < dim; ++j) line[j] = x[j] * inverse * weight[j];
    };

    // An adapter's pair is applied in two halves, on either side of the product that it adds to: both where the row is
    // in one piece and in the hands of one thread.
    auto pair_of = [&](int n, int l, Target target) {
        const int adapter = work->adapter ? work->adapter[n] : -1;
        return adapter < 0 ? LowRank{nullptr, nullptr} : work->adapters[adapter].pairs[l * TARGETS + target];
    };
    auto low_of = [&](int n, int place) { return net->low + (size_t(n) * 3 + place) * net->low_rank; };
    auto shrink = [&](int n, int l, Target target, int place, const float* values, int inputs) {
        const LowRank pair = pair_of(n, l, target);
        if (!pair.down) return;
        const int rank = work->adapters[work->adapter[n]].rank;
        for (int r = 0; r < rank; r += 16) {
            Floats total = zero();
            for (int i = 0; i < inputs; ++i) total = fma(splat(values[i]), load(pair.down + size_t(i) * rank + r), total);
            store(low_of(n, place) + r, total);
        }
    };
    auto grow = [&](int n, int l, Target target, int place, float* values, int outputs) {
        const LowRank pair = pair_of(n, l, target);
        if (!pair.up) return;
        const float* low = low_of(n, place);
        for (int r = 0, rank = work->adapters[work->adapter[n]].rank; r < rank; ++r)
            for (int i = 0; i < outputs; ++i) values[i] += low[r] * pair.up[size_t(r) * outputs + i];
    };

    // Each task is one key/value head of one sequence and a few of its query rows.
    std::vector<int> first_row(work->sequences + 1), first_task(work->sequences + 1);
    for (int q = 0; q < work->sequences; ++q) {
        first_row[q + 1] = first_row[q] + work->count[q];
        first_task[q + 1] = first_task[q] + (work->count[q] * R + QUERIES - 1) / QUERIES * G;
    }
    std::vector<std::atomic<int>> taken(net->layers);
    Team team;

#pragma omp parallel num_threads(net->threads)
    {
#pragma omp single
        team.threads = omp_get_num_threads();  // OpenMP may give fewer than it was asked for
        const int own = omp_get_thread_num();
        float* line = (float*)std::aligned_alloc(64, size_t(line_floats) * 4);
        team.share(rows, own, [&](int n) {
            std::copy_n(work->embedded + size_t(n) * dim, dim, net->x + n * x_stride);
        });
        for (int l = 0; l < net->layers; ++l) {
            const Layer& layer = net->layer[l];
            const Cache cache{net->keys + l * net->layer_bytes, net->values + l * net->layer_bytes,
                              net->blocks, width, lanes, net->has_half_cache != 0};
            const Packed a = packed(rows, dim), b = packed(rows, attended_width), c = packed(rows, net->ffn_dim);
            team.share(rows, own, [&](int n) {
                if (l) grow(n, l - 1, DOWN, 0, net->x + n * x_stride, dim);
                normalised(net->x + n * x_stride, layer.attention_norm, line);
                for (const Target target : {QUERY, KEY, VALUE}) shrink(n, l, target, target, line, dim);
                pack_row(a, n, line, dim);
            });
            product(a, layer.qkv, net->wide, wide_stride, false, own, team.threads);
            team.meet();
            team.share(rows, own, [&](int n) {  // rotate queries and keys, store keys and values
                const float* cosine = net->cosine + size_t(work->position[n]) * half;
                const float* sine = net->sine + size_t(work->position[n]) * half;
                float* row = net->wide + n * wide_stride;
                grow(n, l, QUERY, QUERY, row, H * width);
                grow(n, l, KEY, KEY, row + H * width, G * width);
                grow(n, l, VALUE, VALUE, row + (H + G) * width, G * width);
                for (int h = 0; h < H + G; ++h) {
                    float* x = row + h * width;
                    const float size = h < H ? scale : 1.0f;
                    for (int k = 0; k < half; ++k) {
                        const float first = x[k], second = x[k + half];
                        x[k] = (first * cosine[k] - second * sine[k]) * size;
                        x[k + half] = (second * cosine[k] + first * sine[k]) * size;
                    }
                }
                const int block = work->slot[n] / BLOCK, place = work->slot[n] % BLOCK;
                for (int g = 0; g < G; ++g) {
                    uint8_t *keys = cache.keys + cache.at(block, g), *values = cache.values + cache.at(block, g);
                    const float *key = row + (H + g) * width, *value = row + (H + G + g) * width;
                    for (int k = 0; k < width; ++k) {
                        cache.put(keys, size_t(k) * BLOCK + place, key[k]);
                        cache.put(values, size_t(place) * lanes + k, value[k]);
                    }
                }
            });
            const auto kernel = cache.is_half ? attend_rows<true> : attend_rows<false>;
            for (int q = 0, task; (task = taken[l].fetch_add(1)) < first_task.back();) {
                while (task >= first_task[q + 1]) ++q;
                const int at = task - first_task[q], g = at % G, from = at / G * QUERIES;
                const int count = std::min(QUERIES, work->count[q] * R - from);
                const float* query[QUERIES];
                float* out[QUERIES];
                int seen[QUERIES];
                for (int i = 0; i < count; ++i) {
                    const int t = (from + i) / R, h = g * R + (from + i) % R, n = first_row[q] + t;
                    query[i] = net->wide + n * wide_stride + h * width;
                    out[i] = net->attended + (size_t(n) * H + h) * lanes;
                    seen[i] = work->start[q] + t + 1;
                }
                kernel(cache, work->tables + size_t(q) * work->table_width, g, count, query, seen, out);
            }
            team.meet();
            team.share(rows, own, [&](int n) {
                for (int h = 0; h < H; ++h)
                    std::copy_n(net->attended + (size_t(n) * H + h) * lanes, width, line + h * width);
                shrink(n, l, OUTPUT, 0, line, attended_width);
                pack_row(b, n, line, attended_width);
            });
            product(b, layer.output, net->x, x_stride, true, own, team.threads);
            team.meet();
            team.share(rows, own, [&](int n) {
                grow(n, l, OUTPUT, 0, net->x + n * x_stride, dim);
                normalised(net->x + n * x_stride, layer.ffn_norm, line);
                shrink(n, l, GATE, 0, line, dim);
                shrink(n, l, UP, 1, line, dim);
                pack_row(a, n, line, dim);
            });
            product(a, layer.gate_up, net->wide, wide_stride, false, own, team.threads);
            team.meet();
            team.share(rows, own, [&](int n) {
                float *gate = net->wide + n * wide_stride, *up = gate + ffn;
                grow(n, l, GATE, 0, gate, net->ffn_dim);
                grow(n, l, UP, 1, up, net->ffn_dim);
                for (int i = 0; i < ffn; i += 16) {  // silu(gate) * up
                    const Floats x = load(gate + i);
                    const Floats away = exponential(multiply(x, splat(-1.0f)));
                    store(line + i, multiply(divide(x, add(away, splat(1.0f))), load(up + i)));
                }
                shrink(n, l, DOWN, 0, line, net->ffn_dim);
                pack_row(c, n, line, net->ffn_dim);
            });
            product(c, layer.down, net->x, x_stride, true, own, team.threads);
            team.meet();
        }
        if (work->sampled) {
            const Packed a = packed(work->sampled, dim);
            team.share(work->sampled, own, [&](int r) {
                const int n = work->sampled_rows[r];
                grow(n, net->layers - 1, DOWN, 0, net->x + n * x_stride, dim);
                normalised(net->x + n * x_stride, net->norm, line);
                pack_row(a, r, line, dim);
            });
            product(a, net->head, work->logits, size_t(net->head.outputs + PANEL - 1) / PANEL * PANEL, false, own,
                    team.threads);
        }
        std::free(line);
    }
}

}  // extern "C"
