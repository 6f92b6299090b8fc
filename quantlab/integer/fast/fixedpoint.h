// int32 accumulators to codes, OUT at a time: fixedpoint.py in C.
//
//   code = clamp(zero_point + round(acc * M), low, high)   M = q * 2^(shift - 31)

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { OUT = 16 };  // constants are padded to a multiple
// not unrolled, or gcc no longer sees a vector
#define EACH(i) _Pragma("GCC unroll 1") for (int i = 0; i < OUT; i++)

// ---- Fixed point --------------------------------------------------------------------------------

// What becomes of accumulators: arrays of n channels, and a clamp to low and high, which are less
// zero_point; plain: 1 where all up and away are 0, 2 where accumulators also stay below 2^30.
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

#if defined(__AVX512BW__)
typedef struct {
    __m512i q, odd, half, shift;
} Multiplier;

static inline Multiplier multiplier(const Output *o, int64_t c) {
    __m512i q = _mm512_loadu_si512(o->q + c), down = _mm512_loadu_si512(o->down + c);
    __m512i one = _mm512_set1_epi32(1);
    return (Multiplier){q, _mm512_srli_epi64(q, 32), _mm512_sllv_epi32(one, down),
                        _mm512_add_epi32(down, one)};
}

// round(x * M) where it is plain and |x| < 2^30, so that 2x and the sum with a half fit: products of
// even and odd lanes apart, of either the upper half.
static inline __m512i scaled(__m512i x, Multiplier m) {
    x = _mm512_add_epi32(x, x);
    __m512i even = _mm512_srli_epi64(_mm512_mul_epi32(x, m.q), 32);
    __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(x, 32), m.odd);
    __m512i h = _mm512_mask_blend_epi32(0xAAAA, even, odd);
    return _mm512_srav_epi32(_mm512_add_epi32(h, m.half), m.shift);
}

// The codes of 32 rescaled accumulators; packing to 16 bits saturates beyond low and high.
static inline __m256i pack(__m512i first, __m512i second, const Output *o) {
    __m512i h = _mm512_packs_epi32(first, second);  // in turns four of the first and the second
    h = _mm512_max_epi16(h, _mm512_set1_epi16(o->low));
    h = _mm512_min_epi16(h, _mm512_set1_epi16(o->high));
    h = _mm512_add_epi16(h, _mm512_set1_epi16(o->zero_point));
    h = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), h);
    return _mm512_cvtepi16_epi8(h);
}
#endif

// y[i] = round(x[i] * M) for OUT channels from c.
static inline void rescale(const int32_t *x, const Output *o, int64_t c, int32_t *y) {
    const int32_t *q = o->q + c, *up = o->up + c, *down = o->down + c, *away = o->away + c;
    if (!o->plain) {
        EACH(i) y[i] = rescale_one(x[i], q[i], up[i], down[i], away[i]);
        return;
    }
    // what no compiler finds: products of even and odd lanes apart, and of either the bits 31 .. 62
#if defined(__AVX512BW__)
    __m512i a = _mm512_loadu_si512(x), m = _mm512_loadu_si512(q);
    __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(m, 32));
    __m512i h = _mm512_srli_epi64(_mm512_mul_epi32(a, m), 31);
    h = _mm512_mask_blend_epi32(0xAAAA, h, _mm512_slli_epi64(odd, 1));
    h = _mm512_srav_epi32(h, _mm512_loadu_si512(down));
    _mm512_storeu_si512(y, _mm512_srai_epi32(_mm512_add_epi32(h, _mm512_set1_epi32(1)), 1));
#elif defined(__AVX2__)
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
#if defined(__AVX512BW__)
    __m512i h = _mm512_max_epi32(_mm512_loadu_si512(v), _mm512_set1_epi32(o->low));
    h = _mm512_min_epi32(h, _mm512_set1_epi32(o->high));
    h = _mm512_add_epi32(h, _mm512_set1_epi32(o->zero_point));
    _mm_storeu_si128((__m128i *)codes, _mm512_cvtepi32_epi8(h));
#elif defined(__AVX2__)  // packing to 16 bits saturates beyond low and high
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
