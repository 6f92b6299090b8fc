// The hot path of the fast executor: codes in, int32 accumulators in registers, codes out. Compiled
// and called by native.py.
//
//   acc  = bias + sum (code - zero_point) * weight         wraps at 32 bits (-fwrapv)
//   code = clamp(zero_point + round(acc * M), low, high)   M = q * 2^(shift - 31), fixedpoint.h
//
// Codes are int8 in the order image, row, column, channel (torch's channels-last).

#include "fixedpoint.h"
#include "convolution.h"
#include "words.h"
#include "bytes.h"

#define CONVOLUTION(name, kernel)                                                                 \
    int name(const Shape *s, const int8_t *x, const void *weight, const int32_t *bias,            \
             const int32_t *constants, int8_t *codes, int32_t *logits, int64_t begin,             \
             int64_t end) {                                                                       \
        return convolve(&kernel, s, x, weight, bias, constants, codes, logits, begin, end);       \
    }
CONVOLUTION(conv_words, WORD_KERNEL)
#if defined(dot)
CONVOLUTION(conv_bytes, BYTE_KERNEL)
CONVOLUTION(conv_depthwise, DEPTHWISE_KERNEL)
#endif

// Bits of the sums of bytes here: 32, 16, or 0 where no instruction multiplies them.
int64_t byte_sums(void) { return SUMS; }
int64_t byte_lanes(void) { return LANES; }

#if defined(dot)
// What the instruction for bytes can do by itself: each task adds PEAK_STEPS times to PEAK_SUMS sums
// that stay in registers. x: a vector of codes, then one of weights. y: a number a task.
enum { PEAK_SUMS = 12, PEAK_STEPS = 1 << 14 };
int peak_bytes(const int8_t *x, int32_t *y, int64_t begin, int64_t end) {
    sums codes = load_sums(x), weights = load_sums(x + 4 * LANES);
    for (int64_t task = begin; task < end; task++) {
        sums sum[PEAK_SUMS];
        int32_t lanes[LANES];
        _Pragma("GCC unroll 12") for (int i = 0; i < PEAK_SUMS; i++) sum[i] = broadcast(i);
        for (int64_t step = 0; step < PEAK_STEPS; step++)
            _Pragma("GCC unroll 12") for (int i = 0; i < PEAK_SUMS; i++)
                sum[i] = dot(sum[i], codes, weights);
        for (int i = 0; i < PEAK_SUMS; i++) {
            store_sums(lanes, sum[i]);
            y[task] += lanes[0];
        }
    }
    return 0;
}
int64_t peak_products(void) { return (int64_t)PEAK_SUMS * PEAK_STEPS * 4 * LANES; }
#endif

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

#if defined(__AVX512BW__)
// 16 codes less their zero point, shifted left.
static inline __m512i load_shifted(const int8_t *x, int32_t zero_point, int shift) {
    __m512i v = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x));
    return _mm512_slli_epi32(_mm512_sub_epi32(v, _mm512_set1_epi32(zero_point)), shift);
}
#endif

// code of a + b, each less its zero point, with 20 fractional bits, on the scale 2 * s_a: as s_a >=
// s_b, a is halved, which is exact. operand: constants of b.
int add(const int8_t *a, const int8_t *b, int64_t zero_point_a, int64_t zero_point_b,
        const int32_t *operand, const int32_t *constants, int8_t *y, int64_t begin, int64_t end) {
    Output in = unpack(operand, OUT), o = unpack(constants, OUT);
    int32_t large[CHUNK] = {0}, small[CHUNK] = {0};
    int64_t i = begin;
#if defined(__AVX512BW__)
    Multiplier m = multiplier(&in, 0), last = multiplier(&o, 0);
    for (; in.plain && o.plain && i + 2 * OUT <= end; i += 2 * OUT) {
        __m512i sum[2];
        for (int h = 0; h < 2; h++) {
            __m512i rescaled = scaled(load_shifted(b + i + h * OUT, zero_point_b, 20), m);
            sum[h] = _mm512_add_epi32(rescaled, load_shifted(a + i + h * OUT, zero_point_a, 19));
        }
        __m256i codes = pack(scaled(sum[0], last), scaled(sum[1], last), &o);
        _mm256_storeu_si256((__m256i *)(y + i), codes);
    }
#endif
    for (; i < end; i += CHUNK) {
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
