// Convolution of 16-bit differences code - zero_point, padded with zeros: any weight of 9 bits, two
// products an int32 lane (vpdpwssd with VNNI, else vpmaddwd).

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

static void fill_words(const Shape *s, const int8_t *codes, int64_t n, void *out) {
    int16_t *in = out, zero_point = s->zero_point;
    for (int64_t i = 0; i < n; i++) in[i] = codes[i] - zero_point;
}

static void pad_words(const Shape *s, int64_t n, void *out) { memset(out, 0, 2 * n); }

static void tile_words(const Shape *s, const void *const *window, int64_t row, int64_t column,
                       const void *w, const int32_t *bias, const Result *result) {
    const int16_t *const *x = (const int16_t *const *)window;
    int32_t acc[PIXELS][OUT];
    if (s->depthwise) tile(s, x, row, column, w, bias, acc, 1);
    else tile(s, x, row, column, w, bias, acc, 0);
    store_tile(*acc, OUT, result);
}

static const Kernel WORD_KERNEL = {PIXELS, OUT, 2, fill_words, pad_words, tile_words};
