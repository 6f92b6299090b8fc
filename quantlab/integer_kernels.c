// The hot path of the fast executor: codes in, int32 accumulators in registers, codes out. Compiled and called by integer_native.py.
//
//   acc  = bias + sum (code - zero_point) * weight             wraps at 32 bits (-fwrapv), products of int16 are exact
//   code = clamp(zero_point + round(acc * M), low, high)       M = q * 2^(shift - 31), see fixedpoint.py
//
// Codes are int8 in the order image, row, column, channel (torch's channels-last).

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { OUT = 16 };  // channels computed at a time; weights and constants are padded to a multiple

// ---- Fixed point ------------------------------------------------------------------------------------------------------------

// round(x * q * 2^(shift - 31)) in halves: h = floor of the product at one binary digit too many, then (h + 1) >> 1.
//   single rounding, and double where shift >= 0:  up = max(shift + 1, 0), down = max(-shift - 1, 0), away = 0
//       floor((x * q + 2^(30 - shift)) / 2^(31 - shift)) = ((x * 2^up * q >> 31 >> down) + 1) >> 1
//   double rounding where shift < 0:               up = 0, down = -shift - 1, away = 1
//       the first rounding adds 2^30 to the product; the second one sends ties away from zero: a negative h is one less.
// h fits in 32 bits since |q| < 2^31. An x that would leave 32 bits is clamped first: its code is saturated anyway.
static inline int32_t rescale(int32_t x, int32_t q, int32_t up, int32_t down, int32_t away) {
    int32_t most = INT32_MAX >> up;
    x = x > most ? most : x;
    x = x < ~most ? ~most : x;
    int64_t product = (int64_t)(x << up) * q + ((int64_t)away << 30);
    int32_t h = (int32_t)((uint64_t)product >> 31);  // unsigned, for AVX2 has no other 64-bit shift: the 32 bits kept are the same
    h += (h >> 31) & -away;
    return ((h >> down) + 1) >> 1;
}

// What becomes of accumulators: arrays of n channels, and a clamp to low and high, which are less zero_point; twice: some `away` is 1.
typedef struct {
    int32_t zero_point, low, high, twice;
    const int32_t *q, *up, *down, *away;
} Output;

static inline Output unpack(const int32_t *constants, int64_t n) {
    const int32_t *q = constants + 4;
    return (Output){constants[0], constants[1], constants[2], constants[3], q, q + n, q + 2 * n, q + 3 * n};
}

static inline int8_t code(int32_t acc, const Output *o, int64_t c, int32_t away) {
    int32_t v = rescale(acc, o->q[c], o->up[c], o->down[c], away);
    v = v < o->low ? o->low : v;
    v = v > o->high ? o->high : v;
    return (int8_t)(v + o->zero_point);
}

static inline void store(const int32_t *acc, const Output *o, int64_t c, int8_t *y, int64_t n) {
    int8_t codes[OUT];
    if (o->twice)
        for (int i = 0; i < OUT; i++) codes[i] = code(acc[i], o, c + i, o->away[c + i]);
    else
        for (int i = 0; i < OUT; i++) codes[i] = code(acc[i], o, c + i, 0);
    if (n >= OUT) memcpy(y, codes, OUT);
    else memcpy(y, codes, n);
}

// ---- Convolution: an implicit matrix product --------------------------------------------------------------------------------

typedef struct {
    int64_t images, height, width, channels, rows, columns, outputs;  // of the input and of the output
    int64_t groups, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left, zero_point, depthwise;
    int64_t band_images, band_rows;  // what one task computes
    int64_t stretches, stretch;      // a row of the kernel touches `stretches` runs of `stretch` neighbouring codes, an even number
} Shape;

// acc[i][j] += x[i][k] * w[j][k] + x[i][k + 1] * w[j][k + 1], PIXELS windows times OUT channels; weights are [k / 2][OUT][2].
#if defined(__AVX512VNNI__)
enum { PIXELS = 12, VECTORS = 1 };
typedef __m512i vec;
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define PAIR(i) _mm512_set1_epi32(i)
#define DOT(acc, a, b) _mm512_dpwssd_epi32(acc, a, b)
#elif defined(__AVX2__)
enum { PIXELS = 6, VECTORS = 2 };
typedef __m256i vec;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define PAIR(i) _mm256_set1_epi32(i)
#define DOT(acc, a, b) _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
#else
enum { PIXELS = 4 };
#endif

static void tile(const Shape *s, const int16_t *const *x, int64_t row, int64_t column, const int16_t *w, const int32_t *bias,
                 int32_t (*out)[OUT]) {
#if defined(DOT)
    vec acc[PIXELS][VECTORS];
    for (int i = 0; i < PIXELS; i++)
        for (int v = 0; v < VECTORS; v++) acc[i][v] = LOAD(bias + v * (OUT / VECTORS));
#else
    for (int i = 0; i < PIXELS; i++) memcpy(out[i], bias, sizeof out[i]);
#endif
    for (int64_t u = 0; u < s->kernel_h; u++)
        for (int64_t t = 0; t < s->stretches; t++)
            for (int64_t k = u * row + t * column, end = k + s->stretch; k < end; k += 2, w += 2 * OUT) {
#if defined(DOT)
                vec weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) weight[v] = LOAD(w + v * (2 * OUT / VECTORS));
#pragma GCC unroll 12
                for (int i = 0; i < PIXELS; i++) {
                    int32_t pair;
                    memcpy(&pair, x[i] + k, 4);
                    for (int v = 0; v < VECTORS; v++) acc[i][v] = DOT(acc[i][v], PAIR(pair), weight[v]);
                }
#else
                for (int i = 0; i < PIXELS; i++)
                    for (int j = 0; j < OUT; j++) out[i][j] += x[i][k] * w[2 * j] + x[i][k + 1] * w[2 * j + 1];
#endif
            }
#if defined(DOT)
    for (int i = 0; i < PIXELS; i++)
        for (int v = 0; v < VECTORS; v++) STORE(out[i] + v * (OUT / VECTORS), acc[i][v]);
#endif
}

// One weight a channel and tap, [tap][OUT].
static void depthwise_tile(const Shape *s, const int16_t *x, int64_t row, int64_t column, const int16_t *w, const int32_t *bias, int32_t *out) {
    int32_t acc[OUT];
    memcpy(acc, bias, sizeof acc);
    for (int64_t u = 0; u < s->kernel_h; u++)
        for (int64_t t = 0; t < s->kernel_w; t++, w += OUT)
            for (int j = 0; j < OUT; j++) acc[j] += (int32_t)x[u * row + t * column + j] * w[j];
    memcpy(out, acc, sizeof acc);
}

// int16 differences code - zero_point of one image's rows first .. first + rows, with zeros for padding; [rows][width][channels].
static void widen(const Shape *s, const int8_t *x, int64_t first, int64_t rows, int64_t width, int16_t *out) {
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

// Tasks begin .. end of a convolution; a task is a band of rows, or a few whole images. Of codes and logits one is given.
// bias: one a channel; weight: [groups][outputs of a group / OUT][kernel_h][stretches][stretch / 2][OUT][2]. Returns 0, or 1 without memory.
int conv(const Shape *s, const int8_t *x, const int16_t *weight, const int32_t *bias, const int32_t *constants, int8_t *codes,
         int32_t *logits, int64_t begin, int64_t end) {
    int64_t width = (s->columns - 1) * s->stride_w + (s->kernel_w - 1) * s->dilation_w + 1;
    int64_t height = (s->band_rows - 1) * s->stride_h + (s->kernel_h - 1) * s->dilation_h + 1;
    int64_t row = s->dilation_h * width * s->channels, column = s->dilation_w * s->channels;
    int64_t per_group = s->depthwise ? s->outputs : s->outputs / s->groups, groups = s->depthwise ? 1 : s->groups;
    int64_t size = s->kernel_h * s->stretches * s->stretch * OUT, padded = (per_group + OUT - 1) / OUT * OUT;
    int64_t bands = (s->rows + s->band_rows - 1) / s->band_rows;
    Output o = logits ? (Output){0} : unpack(constants, groups * padded);
    int16_t *wide = malloc(2 * (s->band_images * height * width * s->channels + 2 * OUT));
    const int16_t **window = malloc(sizeof *window * (s->band_images * s->band_rows * s->columns + PIXELS));
    for (int64_t task = begin; wide && window && task < end; task++) {
        int64_t image = task / bands * s->band_images, first = task % bands * s->band_rows, pixels = 0;
        int64_t images = s->images - image < s->band_images ? s->images - image : s->band_images;
        int64_t rows = s->rows - first < s->band_rows ? s->rows - first : s->band_rows;
        for (int64_t i = 0; i < images; i++) {
            int16_t *in = wide + i * height * width * s->channels;
            widen(s, x + (image + i) * s->height * s->width * s->channels, first * s->stride_h - s->top, height, width, in);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < s->columns; c++) window[pixels++] = in + (r * s->stride_h * width + c * s->stride_w) * s->channels;
        }
        for (int i = 0; i < PIXELS; i++) window[pixels + i] = window[pixels - 1];  // so that the last tile is a whole one
        int64_t start = (image * s->rows + first) * s->columns;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t n = 0; n < per_group; n += OUT) {
                int64_t channel = g * padded + n, left = per_group - n < OUT ? per_group - n : OUT;
                for (int64_t p = 0; p < pixels; p += PIXELS) {
                    const int16_t *in[PIXELS];
                    int32_t acc[PIXELS][OUT];
                    for (int i = 0; i < PIXELS; i++) in[i] = window[p + i] + (s->depthwise ? n : g * (s->channels / s->groups));
                    if (s->depthwise)
                        for (int i = 0; i < PIXELS; i++)
                            depthwise_tile(s, in[i], row, column, weight + n / OUT * size, bias + n, acc[i]);
                    else tile(s, in, row, column, weight + channel / OUT * size, bias + channel, acc);
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

// ---- Passes over codes, elements begin .. end -------------------------------------------------------------------------------

// code(x - zero_point_in), one multiplier for all.
int requantize(const int8_t *x, int64_t zero_point_in, const int32_t *constants, int8_t *y, int64_t begin, int64_t end) {
    Output o = unpack(constants, 1);
    for (int64_t i = begin; i < end; i++) y[i] = code(x[i] - (int32_t)zero_point_in, &o, 0, o.away[0]);
    return 0;
}

// code(rescaled a + rescaled b): both with 20 fractional bits, on a common scale. 
int add(const int8_t *a, const int8_t *b, const int32_t *zero_points, const int32_t *operands, const int32_t *constants, int8_t *y,
        int64_t begin, int64_t end) {
    Output in = unpack(operands, 2), o = unpack(constants, 1);
    for (int64_t i = begin; i < end; i++) {
        int32_t left = rescale((a[i] - zero_points[0]) << 20, in.q[0], in.up[0], in.down[0], in.away[0]);
        int32_t right = rescale((b[i] - zero_points[1]) << 20, in.q[1], in.up[1], in.down[1], in.away[1]);
        y[i] = code(left + right, &o, 0, o.away[0]);
    }
    return 0;
}

// code((x - zero_point_in) * weight + bias), one of each a channel; begin and end count rows of `channels`.
int affine(const int8_t *x, int64_t channels, int64_t zero_point_in, const int32_t *weight, const int32_t *bias, const int32_t *constants,
           int8_t *y, int64_t begin, int64_t end) {
    Output o = unpack(constants, channels);
    for (int64_t m = begin; m < end; m++)
        for (int64_t c = 0; c < channels; c++) {
            int64_t i = m * channels + c;
            y[i] = code((x[i] - (int32_t)zero_point_in) * weight[c] + bias[c], &o, c, o.away[c]);
        }
    return 0;
}
