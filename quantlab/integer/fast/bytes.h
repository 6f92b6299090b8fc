// Convolution of bytes: unsigned codes times signed weights, four products an int32 lane.
//
//     u = code - least       0 .. 255, padding is zero_point - least
//     acc = bias + sum (code - zero_point) * w = (bias - (zero_point - least) * sum w) + sum u * w
//
// The bracket is computed once, in native.py. Weights are [k / 4][OUTPUTS][4]; of a window four
// codes are broadcast. With VNNI one instruction multiplies and adds all four to the int32 sum
// (vpdpbusd). Without, vpmaddubsw adds pairs in 16 bits; sums stay there for s->run products of four,
// as many as the weights' own worst case allows, and are then widened.

#if defined(EMULATE_VNNI) || defined(EMULATE_AVX2)
#include "emulated.h"
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { SUMS = 32, LANES = 16 };
typedef __m512i sums;
#define load_sums(p) _mm512_loadu_si512(p)
#define store_sums(p, v) _mm512_storeu_si512(p, v)
#define broadcast(i) _mm512_set1_epi32(i)
#define dot(acc, u, w) _mm512_dpbusd_epi32(acc, u, w)
#elif defined(__AVX2__)
typedef __m256i sums;
#define load_sums(p) _mm256_loadu_si256((const __m256i *)(p))
#define store_sums(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define broadcast(i) _mm256_set1_epi32(i)
#if defined(__AVXVNNI__)
enum { SUMS = 32, LANES = 8 };
#define dot(acc, u, w) _mm256_dpbusd_avx_epi32(acc, u, w)
#else
enum { SUMS = 16, LANES = 8 };
#define dot(acc, u, w) _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, w))
#define widen(acc, sum) _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))
#endif
#else
enum { SUMS = 0, LANES = 8 };  // no instruction for bytes
#endif

#define UNROLL _Pragma("GCC unroll 8")
enum { BYTE_PIXELS = 6, BYTE_OUTPUTS = 2 * LANES };

static void fill_bytes(const Shape *s, const int8_t *codes, int64_t n, void *out) {
    uint8_t *u = out, least = s->least;
    for (int64_t i = 0; i < n; i++) u[i] = codes[i] - least;
}

static void pad_bytes(const Shape *s, int64_t n, void *out) {
    memset(out, s->zero_point - s->least, n);
}

#if defined(dot)
#if !defined(widen)
#define widen(acc, sum) sum  // 32 bits wide already
#endif

// Adds sums of 16 bits to those of 32 in memory, and starts again.
static inline __attribute__((always_inline)) void widen_sums(
        sums (*sum)[2], int32_t (*acc)[BYTE_OUTPUTS], const int vectors) {
    UNROLL for (int i = 0; i < BYTE_PIXELS; i++)
        UNROLL for (int v = 0; v < vectors; v++) {
            int32_t *wide = acc[i] + v * LANES;
            store_sums(wide, widen(load_sums(wide), sum[i][v]));
            sum[i][v] = broadcast(0);
        }
}

static inline __attribute__((always_inline)) void tile_bytes_of(
        const Shape *s, const uint8_t *const *window, int64_t row, int64_t column, const int8_t *w,
        const int32_t *bias, const Result *result, const int vectors) {
    sums sum[BYTE_PIXELS][2];
    int32_t acc[BYTE_PIXELS][BYTE_OUTPUTS];
    const uint8_t *x[BYTE_PIXELS];
    int64_t left = s->run;
    UNROLL for (int i = 0; i < BYTE_PIXELS; i++) {
        x[i] = window[i];
        UNROLL for (int v = 0; v < vectors; v++) {
            sum[i][v] = load_sums(bias + v * LANES);
            if (SUMS == 16) {
                store_sums(acc[i] + v * LANES, sum[i][v]);
                sum[i][v] = broadcast(0);
            }
        }
    }
    for (int64_t u = 0; u < s->kernel_h; u++)
        for (int64_t t = 0; t < s->stretches; t++)
            for (int64_t k = u * row + t * column, end = k + s->stretch; k < end;) {
                int64_t stop = SUMS == 16 && (end - k) / 4 > left ? k + 4 * left : end;
                left -= (stop - k) / 4;
                for (; k < stop; k += 4, w += 4 * BYTE_OUTPUTS) {
                    sums weight[2];
                    UNROLL for (int v = 0; v < vectors; v++)
                        weight[v] = load_sums(w + v * 4 * LANES);
                    UNROLL for (int i = 0; i < BYTE_PIXELS; i++) {
                        int32_t four;
                        memcpy(&four, x[i] + k, 4);
                        sums codes = broadcast(four);
                        UNROLL for (int v = 0; v < vectors; v++)
                            sum[i][v] = dot(sum[i][v], codes, weight[v]);
                    }
                }
                if (SUMS == 16 && left == 0) {
                    widen_sums(sum, acc, vectors);
                    left = s->run;
                }
            }
#if defined(__AVX512BW__) && !defined(EMULATED)
    if (result->codes && result->output->plain && vectors == 2 && result->n == BYTE_OUTPUTS) {
        const Output *o = result->output;
        Multiplier first = multiplier(o, result->channel);
        Multiplier second = multiplier(o, result->channel + LANES);
        UNROLL for (int i = 0; i < BYTE_PIXELS; i++) {
            if (i >= result->pixels) break;
            __m256i codes = pack(scaled(sum[i][0], first), scaled(sum[i][1], second), o);
            _mm256_storeu_si256((__m256i *)(result->codes + i * result->pitch), codes);
        }
        return;
    }
#endif
    widen_sums(sum, acc, vectors);
    store_tile(*acc, BYTE_OUTPUTS, result);
}

static void tile_bytes(const Shape *s, const void *const *window, int64_t row, int64_t column,
                       const void *w, const int32_t *bias, const Result *result) {
    const uint8_t *const *x = (const uint8_t *const *)window;
    if (result->n > LANES) tile_bytes_of(s, x, row, column, w, bias, result, 2);
    else tile_bytes_of(s, x, row, column, w, bias, result, 1);
}
#else
static void tile_bytes(const Shape *s, const void *const *window, int64_t row, int64_t column,
                       const void *w, const int32_t *bias, const Result *result) {}
#endif

static const Kernel BYTE_KERNEL = {BYTE_PIXELS, BYTE_OUTPUTS, 1, fill_bytes, pad_bytes, tile_bytes};
