// The hot path of the fast executor: codes in, int32 accumulators in registers, codes out. Compiled
// and called by native.py.
//
//   acc  = bias + sum (code - zero_point) * weight         wraps at 32 bits (-fwrapv)
//   code = clamp(zero_point + round(acc * M), low, high)   M = q * 2^(shift - 31), fixedpoint.py
//
// Codes are int8 in the order image, row, column, channel (torch's channels-last).

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { OUT = 16 };  // channels computed at a time; weights and constants are padded to a multiple
// not unrolled, or gcc no longer sees a vector
#define EACH(i) _Pragma("GCC unroll 1") for (int i = 0; i < OUT; i++)

// ---- Fixed point --------------------------------------------------------------------------------

// What becomes of accumulators: arrays of n channels, and a clamp to low and high, which are less
// zero_point; plain: all up and away are 0.
typedef struct {
    int32_t zero_point, low, high, plain;
    const int32_t *q, *up, *down, *away;
} Output;

static inline Output unpack(const int32_t *constants, int64_t n) {
    const int32_t *q = constants + 4;
    return (Output){constants[0], constants[1], constants[2], constants[3],
                    q, q + n, q + 2 * n, q + 3 * n};
}

// round(x * q * 2^(shift - 31)) in two steps: h = floor of the product at one binary digit too
// many, then (h + 1) >> 1.
//   single rounding, and double where shift >= 0:
//       up = max(shift + 1, 0), down = max(-shift - 1, 0), away = 0, from
//       (x * q + 2^(30 - shift)) >> (31 - shift) = ((x * 2^up * q >> 31 >> down) + 1) >> 1
//   double rounding where shift < 0: up = 0, down = -shift - 1, away = 1
//       the first rounding adds 2^30 to the product; the second sends ties away from zero, which
//       takes one from a negative h.
// h fits in 32 bits since q < 2^31. An x that leaves 32 bits with x * 2^up is clamped before: its
// code is saturated anyway.
static inline int32_t rescale_one(int32_t x, int32_t q, int32_t up, int32_t down, int32_t away) {
    int32_t most = INT32_MAX >> up;
    x = x > most ? most : x < ~most ? ~most : x;
    // unsigned, for AVX2 shifts no other; the 32 bits kept are the same
    uint64_t product = (int64_t)(x << up) * q + ((int64_t)away << 30);
    int32_t h = product >> 31;
    h += (h >> 31) & -away;
    return ((h >> down) + 1) >> 1;
}

// y[i] = round(x[i] * M) for OUT channels from c.
static inline void rescale(const int32_t *x, const Output *o, int64_t c, int32_t *y) {
    const int32_t *q = o->q + c, *up = o->up + c, *down = o->down + c, *away = o->away + c;
    if (!o->plain) {
        EACH(i) y[i] = rescale_one(x[i], q[i], up[i], down[i], away[i]);
        return;
    }
#if defined(__AVX2__)
    // what no compiler finds: products of even and odd lanes apart, and of either the bits 31 .. 62
    for (int i = 0; i < OUT; i += 8) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(x + i));
        __m256i m = _mm256_loadu_si256((const __m256i *)(q + i));
        __m256i right = _mm256_loadu_si256((const __m256i *)(down + i));
        __m256i even = _mm256_mul_epi32(a, m);
        __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(m, 32));
        even = _mm256_srli_epi64(even, 31);
        __m256i h = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 1), 0xAA);
        h = _mm256_add_epi32(_mm256_srav_epi32(h, right), _mm256_set1_epi32(1));
        _mm256_storeu_si256((__m256i *)(y + i), _mm256_srai_epi32(h, 1));
    }
#else
    EACH(i) y[i] = rescale_one(x[i], q[i], 0, down[i], 0);
#endif
}

// Codes of OUT accumulators, of which n are stored.
static inline void store(const int32_t *acc, const Output *o, int64_t c, int8_t *y, int64_t n) {
    int32_t v[OUT];
    int8_t codes[OUT];
    rescale(acc, o, c, v);
#if defined(__AVX2__)  // packing to 16 bits saturates beyond low and high
    __m256i h = _mm256_packs_epi32(_mm256_loadu_si256((const __m256i *)v),
                                   _mm256_loadu_si256((const __m256i *)(v + 8)));
    h = _mm256_max_epi16(h, _mm256_set1_epi16(o->low));
    h = _mm256_min_epi16(h, _mm256_set1_epi16(o->high));
    h = _mm256_add_epi16(h, _mm256_set1_epi16(o->zero_point));
    h = _mm256_packs_epi16(h, h);  // the halves of 4 and 4 codes lie crosswise
    __m128i first = _mm256_castsi256_si128(h), second = _mm256_extracti128_si256(h, 1);
    _mm_storeu_si128((__m128i *)codes, _mm_unpacklo_epi32(first, second));
#else
    EACH(i) {
        v[i] = v[i] < o->low ? o->low : v[i];
        codes[i] = (v[i] > o->high ? o->high : v[i]) + o->zero_point;
    }
#endif
    if (n >= OUT) memcpy(y, codes, OUT);
    else memcpy(y, codes, n);
}

// ---- Convolution: an implicit matrix product ----------------------------------------------------

typedef struct {
    int64_t images, height, width, channels;  // of the input
    int64_t rows, columns, outputs;           // of the output
    int64_t groups, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
    int64_t zero_point, depthwise;
    int64_t band_images, band_rows;  // what one task computes
    // a row of the kernel touches `stretches` runs of `stretch` neighbouring codes, an even number
    int64_t stretches, stretch;
} Shape;

// PIXELS windows x OUT channels; weights w are [k / 2][OUT][2]:
//     acc[i][j] += x[i][k] * w[k / 2][j][0] + x[i][k + 1] * w[k / 2][j][1]
// depthwise, one weight a channel and tap, and a zero beside it:
//     acc[i][j] += x[i][k + j] * w[k / 2][j][0]
#if defined(__AVX512VNNI__)
enum { PIXELS = 12, VECTORS = 1 };
typedef __m512i vec;
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define PAIR(i) _mm512_set1_epi32(i)
#define WIDEN(p) _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define DOT(acc, a, b) _mm512_dpwssd_epi32(acc, a, b)
#elif defined(__AVX2__)
enum { PIXELS = 6, VECTORS = 2 };
typedef __m256i vec;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define PAIR(i) _mm256_set1_epi32(i)
#define WIDEN(p) _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define DOT(acc, a, b) _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
#else
enum { PIXELS = 4 };
#endif

static inline void tile(const Shape *s, const int16_t *const *x, int64_t row, int64_t column,
                        const int16_t *w, const int32_t *bias, int32_t (*out)[OUT],
                        int depthwise) {
#if defined(DOT)
    vec acc[PIXELS][VECTORS];
    for (int i = 0; i < PIXELS; i++)
        for (int v = 0; v < VECTORS; v++) acc[i][v] = LOAD(bias + v * (OUT / VECTORS));
#else
    for (int i = 0; i < PIXELS; i++) memcpy(out[i], bias, sizeof out[i]);
#endif
    for (int64_t u = 0; u < s->kernel_h; u++)
        for (int64_t t = 0; t < s->stretches; t++)
            for (int64_t k = u * row + t * column, end = k + s->stretch; k < end;
                 k += 2, w += 2 * OUT) {
#if defined(DOT)
                vec weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) weight[v] = LOAD(w + v * (2 * OUT / VECTORS));
#pragma GCC unroll 12
                for (int i = 0; i < PIXELS; i++) {
                    int32_t pair;
                    memcpy(&pair, x[i] + k, 4);
                    for (int v = 0; v < VECTORS; v++) {
                        const int16_t *own = x[i] + k + v * (OUT / VECTORS);
                        acc[i][v] = DOT(acc[i][v], depthwise ? WIDEN(own) : PAIR(pair), weight[v]);
                    }
                }
#else
                for (int i = 0; i < PIXELS; i++)
                    for (int j = 0; j < OUT; j++)
                        out[i][j] += depthwise
                            ? x[i][k + j] * w[2 * j]
                            : x[i][k] * w[2 * j] + x[i][k + 1] * w[2 * j + 1];
#endif
            }
#if defined(DOT)
    for (int i = 0; i < PIXELS; i++)
        for (int v = 0; v < VECTORS; v++) STORE(out[i] + v * (OUT / VECTORS), acc[i][v]);
#endif
}

// int16 differences code - zero_point of one image's rows first .. first + rows, with zeros for
// padding; [rows][width][channels].
static void widen(const Shape *s, const int8_t *x, int64_t first, int64_t rows, int64_t width,
                  int16_t *out) {
    int64_t c = s->channels, inside = s->width < width - s->left ? s->width : width - s->left;
    for (int64_t r = first; r < first + rows; r++, out += width * c) {
        if (r < 0 || r >= s->height || inside <= 0) {
            memset(out, 0, 2 * width * c);
            continue;
        }
        const int8_t *source = x + r * s->width * c;
        int16_t *in = out + s->left * c, zero_point = s->zero_point;
        memset(out, 0, 2 * s->left * c);
        for (int64_t i = 0; i < inside * c; i++) in[i] = source[i] - zero_point;
        memset(in + inside * c, 0, 2 * (width - s->left - inside) * c);
    }
}

// Tasks begin .. end of a convolution; a task is a band of rows, or a few whole images. Of codes
// and logits one is given. Returns 0, or 1 where memory is short.
// weight: [groups][outputs of a group / OUT][kernel_h][stretches][stretch / 2][OUT][2]
int conv(const Shape *s, const int8_t *x, const int16_t *weight, const int32_t *bias,
         const int32_t *constants, int8_t *codes, int32_t *logits, int64_t begin, int64_t end) {
    int64_t width = (s->columns - 1) * s->stride_w + (s->kernel_w - 1) * s->dilation_w + 1;
    int64_t height = (s->band_rows - 1) * s->stride_h + (s->kernel_h - 1) * s->dilation_h + 1;
    int64_t row = s->dilation_h * width * s->channels, column = s->dilation_w * s->channels;
    int64_t groups = s->depthwise ? 1 : s->groups, per_group = s->outputs / groups;
    int64_t size = s->kernel_h * s->stretches * s->stretch * OUT;
    int64_t padded = (per_group + OUT - 1) / OUT * OUT;
    int64_t pitch = s->height * s->width * s->channels;  // from image to image
    int64_t wide_pitch = height * width * s->channels;  // the same in `wide`
    int64_t bands = (s->rows + s->band_rows - 1) / s->band_rows;
    Output o = logits ? (Output){0} : unpack(constants, groups * padded);
    int64_t windows = s->band_images * s->band_rows * s->columns;
    int16_t *wide = malloc(2 * (s->band_images * wide_pitch + 2 * OUT));
    const int16_t **window = malloc(sizeof *window * (windows + PIXELS));
    for (int64_t task = begin; wide && window && task < end; task++) {
        int64_t image = task / bands * s->band_images, first = task % bands * s->band_rows;
        int64_t pixels = 0, top = first * s->stride_h - s->top;
        int64_t images = s->images - image < s->band_images ? s->images - image : s->band_images;
        int64_t rows = s->rows - first < s->band_rows ? s->rows - first : s->band_rows;
        for (int64_t i = 0; i < images; i++) {
            int16_t *in = wide + i * wide_pitch;
            widen(s, x + (image + i) * pitch, top, height, width, in);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < s->columns; c++)
                    window[pixels++] =
                        in + (r * s->stride_h * width + c * s->stride_w) * s->channels;
        }
        // so that the last tile is a whole one
        for (int i = 0; i < PIXELS; i++) window[pixels + i] = window[pixels - 1];
        int64_t start = (image * s->rows + first) * s->columns;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t n = 0; n < per_group; n += OUT) {
                int64_t channel = g * padded + n, left = per_group - n < OUT ? per_group - n : OUT;
                int64_t from = s->depthwise ? n : g * (s->channels / s->groups);
                const int16_t *w = weight + channel / OUT * size;
                for (int64_t p = 0; p < pixels; p += PIXELS) {
                    const int16_t *in[PIXELS];
                    int32_t acc[PIXELS][OUT];
                    for (int i = 0; i < PIXELS; i++) in[i] = window[p + i] + from;
                    if (s->depthwise) tile(s, in, row, column, w, bias + channel, acc, 1);
                    else tile(s, in, row, column, w, bias + channel, acc, 0);
                    for (int i = 0; i < PIXELS && p + i < pixels; i++) {
                        int64_t at = (start + p + i) * s->outputs + g * per_group + n;
                        if (logits) memcpy(logits + at, acc[i], 4 * left);
                        else store(acc[i], &o, channel, codes + at, left);
                    }
                }
            }
    }
    int failed = !wide || !window;
    free(wide);
    free(window);
    return failed;
}

// ---- Passes over codes; arrays of constants are padded to a multiple of OUT ---------------------

enum { CHUNK = 4 * OUT };  // elements at a time, in loops that compilers turn into vectors

// n <= CHUNK codes less their zero point, shifted left.
static inline void load(const int8_t *x, int64_t n, int32_t zero_point, int shift, int32_t *v) {
    for (int64_t i = 0; i < n; i++) v[i] = (x[i] - zero_point) << shift;
}

// code of x - zero_point_in, elements begin .. end with one multiplier, OUT times.
int requantize(const int8_t *x, int64_t zero_point_in, const int32_t *constants, int8_t *y,
               int64_t begin, int64_t end) {
    Output o = unpack(constants, OUT);
    int32_t acc[CHUNK] = {0};
    for (int64_t i = begin; i < end; i += CHUNK) {
        int64_t n = end - i < CHUNK ? end - i : CHUNK;
        load(x + i, n, zero_point_in, 0, acc);
        for (int64_t c = 0; c < n; c += OUT) store(acc + c, &o, 0, y + i + c, n - c);
    }
    return 0;
}

// code of a + b, each less its zero point, with 20 fractional bits, on the scale 2 * s_a: as s_a >=
// s_b, a is halved, which is exact. operand: constants of b.
int add(const int8_t *a, const int8_t *b, int64_t zero_point_a, int64_t zero_point_b,
        const int32_t *operand, const int32_t *constants, int8_t *y, int64_t begin, int64_t end) {
    Output in = unpack(operand, OUT), o = unpack(constants, OUT);
    int32_t large[CHUNK] = {0}, small[CHUNK] = {0};
    for (int64_t i = begin; i < end; i += CHUNK) {
        int64_t n = end - i < CHUNK ? end - i : CHUNK;
        load(a + i, n, zero_point_a, 19, large);
        load(b + i, n, zero_point_b, 20, small);
        for (int64_t c = 0; c < n; c += OUT) rescale(small + c, &in, 0, small + c);
        for (int64_t j = 0; j < CHUNK; j++) large[j] += small[j];
        for (int64_t c = 0; c < n; c += OUT) store(large + c, &o, 0, y + i + c, n - c);
    }
    return 0;
}

// code of (x - zero_point_in) * weight + bias, rows begin .. end of [rows][channels].
int affine(const int8_t *x, int64_t channels, int64_t zero_point_in, const int32_t *weight,
           const int32_t *bias, const int32_t *constants, int8_t *y, int64_t begin, int64_t end) {
    Output o = unpack(constants, (channels + OUT - 1) / OUT * OUT);
    int32_t acc[CHUNK] = {0};
    for (int64_t i = begin * channels; i < end * channels; i += channels)
        for (int64_t c = 0; c < channels; c += CHUNK) {
            int64_t n = channels - c < CHUNK ? channels - c : CHUNK;
            load(x + i + c, n, zero_point_in, 0, acc);
            for (int64_t j = 0; j < n; j++) acc[j] = acc[j] * weight[c + j] + bias[c + j];
            for (int64_t j = 0; j < n; j += OUT) store(acc + j, &o, c + j, y + i + c + j, n - j);
        }
    return 0;
}
