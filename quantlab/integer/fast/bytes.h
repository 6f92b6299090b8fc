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
#define BYTES_512
enum { SUMS = 32, LANES = 16 };
typedef __m512i sums;
#define load_sums(p) _mm512_loadu_si512(p)
#define store_sums(p, v) _mm512_storeu_si512(p, v)
#define broadcast(i) _mm512_set1_epi32(i)
#define dot(acc, u, w) _mm512_dpbusd_epi32(acc, u, w)
#define low8(a, b) _mm512_unpacklo_epi8(a, b)
#define high8(a, b) _mm512_unpackhi_epi8(a, b)
#define low16(a, b) _mm512_unpacklo_epi16(a, b)
#define high16(a, b) _mm512_unpackhi_epi16(a, b)
#elif defined(__AVX2__)
typedef __m256i sums;
#define load_sums(p) _mm256_loadu_si256((const __m256i *)(p))
#define store_sums(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define broadcast(i) _mm256_set1_epi32(i)
#define low8(a, b) _mm256_unpacklo_epi8(a, b)
#define high8(a, b) _mm256_unpackhi_epi8(a, b)
#define low16(a, b) _mm256_unpacklo_epi16(a, b)
#define high16(a, b) _mm256_unpackhi_epi16(a, b)
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
#define INLINE static inline __attribute__((always_inline))
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
#define dot_wide(acc, u, w) dot(acc, u, w)
#else
#define dot_wide(acc, u, w) widen(acc, dot(broadcast(0), u, w))
#endif

// Writes the sums of 2 * LANES channels from c, those of pixel i in sum[i * vectors] and the next.
INLINE void finish(const sums *sum, const int vectors, const int pixels, int64_t c,
                   const Result *r) {
    int64_t n = r->n - c < 2 * LANES ? r->n - c : 2 * LANES;
    if (n <= 0) return;
#if defined(BYTES_512)
    if (r->codes && r->output->plain == 2 && n == 2 * LANES) {
        Multiplier a = multiplier(r->output, r->channel + c);
        Multiplier b = multiplier(r->output, r->channel + c + LANES);
        UNROLL for (int i = 0; i < pixels; i++) {
            if (i >= r->pixels) return;
            const sums *own = sum + i * vectors;
            __m256i codes = pack(scaled(own[0], a), scaled(own[1], b), r->output);
            _mm256_storeu_si256((__m256i *)(r->codes + i * r->pitch + c), codes);
        }
        return;
    }
#endif
    UNROLL for (int i = 0; i < pixels; i++) {
        int32_t acc[2 * LANES];
        int64_t at = i * r->pitch + c;
        if (i >= r->pixels) return;
        UNROLL for (int v = 0; v < 2; v++) store_sums(acc + v * LANES, sum[i * vectors + v]);
        if (r->logits) memcpy(r->logits + at, acc, 4 * n);
        else for (int64_t j = 0; j < n; j += OUT)
            store(acc + j, r->output, r->channel + c + j, r->codes + at + j, n - j);
    }
}

// Adds sums of 16 bits to those of 32 in memory, and starts again.
INLINE void widen_sums(sums (*sum)[2], int32_t (*acc)[BYTE_OUTPUTS], const int vectors) {
    UNROLL for (int i = 0; i < BYTE_PIXELS; i++)
        UNROLL for (int v = 0; v < vectors; v++) {
            int32_t *wide = acc[i] + v * LANES;
            store_sums(wide, widen(load_sums(wide), sum[i][v]));
            sum[i][v] = broadcast(0);
        }
}

INLINE void tile_bytes_of(const Shape *s, const uint8_t *const *window, int64_t row, int64_t column,
                          const int8_t *w, const int32_t *bias, const Result *result,
                          const int vectors) {
    sums sum[BYTE_PIXELS][2];
    int32_t acc[BYTE_PIXELS][BYTE_OUTPUTS];  // where 16 bits are too few for the whole sum
    const uint8_t *x[BYTE_PIXELS];
    int64_t left = s->run;
    UNROLL for (int i = 0; i < BYTE_PIXELS; i++) {
        x[i] = window[i];
        UNROLL for (int v = 0; v < 2; v++) {
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
    if (SUMS == 16) {
        widen_sums(sum, acc, vectors);
        UNROLL for (int i = 0; i < BYTE_PIXELS; i++)
            UNROLL for (int v = 0; v < 2; v++) sum[i][v] = load_sums(acc[i] + v * LANES);
    }
    finish(*sum, 2, BYTE_PIXELS, 0, result);
}

static void tile_bytes(const Shape *s, const void *const *window, int64_t row, int64_t column,
                       const void *w, const int32_t *bias, const Result *result) {
    const uint8_t *const *x = (const uint8_t *const *)window;
    if (result->n > LANES) tile_bytes_of(s, x, row, column, w, bias, result, 2);
    else tile_bytes_of(s, x, row, column, w, bias, result, 1);
}

static const Kernel BYTE_KERNEL = {BYTE_PIXELS, BYTE_OUTPUTS, 1, fill_bytes, pad_bytes, tile_bytes};

// Depthwise: four taps of 4 * LANES channels, interleaved. That puts channels 16 l + 4 v + (0 .. 3)
// into the 128 bits l of vector v, as weights and bias are packed too; in_order undoes it.
enum { DEPTHWISE_PIXELS = 4 };

INLINE void in_order(sums *v) {
#if defined(EMULATED)
    sums in[4] = {v[0], v[1], v[2], v[3]};
    for (int i = 0; i < 4 * LANES; i++)
        v[i / LANES].lane[i % LANES] = in[i / 4 % 4].lane[i / 16 * 4 + i % 4];
#elif defined(BYTES_512)
    __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xEE), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_i32x4(a, b, 0x88), v[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
    v[2] = _mm512_shuffle_i32x4(c, d, 0x88), v[3] = _mm512_shuffle_i32x4(c, d, 0xDD);
#else
    __m256i a = _mm256_permute2x128_si256(v[0], v[1], 0x31);
    v[0] = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    v[1] = _mm256_permute2x128_si256(v[2], v[3], 0x20);
    v[3] = _mm256_permute2x128_si256(v[2], v[3], 0x31);
    v[2] = a;
#endif
}

static void tile_depthwise(const Shape *s, const void *const *window, int64_t row, int64_t column,
                           const void *weight, const int32_t *bias, const Result *result) {
    sums sum[DEPTHWISE_PIXELS][4];
    const int8_t *w = weight;
    int64_t u = 0, t = 0, taps = s->kernel_h * s->kernel_w;
    UNROLL for (int i = 0; i < DEPTHWISE_PIXELS; i++)
        UNROLL for (int v = 0; v < 4; v++) sum[i][v] = load_sums(bias + v * LANES);
    for (int64_t done = 0; done < taps; done += 4, w += 16 * LANES) {
        int64_t tap[4];  // behind the last its weights are 0
        for (int j = 0; j < 4; j++) {
            tap[j] = u * row + t * column;
            if (done + j + 1 < taps && ++t == s->kernel_w) t = 0, u++;
        }
        UNROLL for (int i = 0; i < DEPTHWISE_PIXELS; i++) {
            const uint8_t *x = window[i];
            sums a = load_sums(x + tap[0]), b = load_sums(x + tap[1]);
            sums c = load_sums(x + tap[2]), d = load_sums(x + tap[3]);
            sums ab = low8(a, b), cd = low8(c, d);
            sum[i][0] = dot_wide(sum[i][0], low16(ab, cd), load_sums(w));
            sum[i][1] = dot_wide(sum[i][1], high16(ab, cd), load_sums(w + 4 * LANES));
            ab = high8(a, b), cd = high8(c, d);
            sum[i][2] = dot_wide(sum[i][2], low16(ab, cd), load_sums(w + 8 * LANES));
            sum[i][3] = dot_wide(sum[i][3], high16(ab, cd), load_sums(w + 12 * LANES));
        }
    }
    UNROLL for (int i = 0; i < DEPTHWISE_PIXELS; i++) in_order(sum[i]);
    finish(*sum, 4, DEPTHWISE_PIXELS, 0, result);
    finish(*sum + 2, 4, DEPTHWISE_PIXELS, 2 * LANES, result);
}

static const Kernel DEPTHWISE_KERNEL = {
    DEPTHWISE_PIXELS, 4 * LANES, 1, fill_bytes, pad_bytes, tile_depthwise};
#endif
