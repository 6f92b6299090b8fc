// The instructions of bytes.h in plain C, for machines without them: -DEMULATE_VNNI, -DEMULATE_AVX2.
#define EMULATED

#if defined(EMULATE_VNNI)
enum { SUMS = 32, LANES = 16 };
#else
enum { SUMS = 16, LANES = 8 };
#endif

typedef struct {
    int32_t lane[LANES];
} sums;

static inline sums load_sums(const void *p) {
    sums v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_sums(void *p, sums v) { memcpy(p, &v, sizeof v); }

static inline sums broadcast(int32_t x) {
    sums v;
    for (int i = 0; i < LANES; i++) v.lane[i] = x;
    return v;
}

#if defined(EMULATE_VNNI)
// vpdpbusd: acc + four products, exact
static inline sums dot(sums acc, sums codes, sums weights) {
    const uint8_t *u = (const uint8_t *)&codes;
    const int8_t *w = (const int8_t *)&weights;
    for (int i = 0; i < 4 * LANES; i++) acc.lane[i / 4] += u[i] * w[i];
    return acc;
}
#else
// vpmaddubsw, which saturates pairs at 16 bits, and vpaddw, which wraps
static inline sums dot(sums acc, sums codes, sums weights) {
    const uint8_t *u = (const uint8_t *)&codes;
    const int8_t *w = (const int8_t *)&weights;
    int16_t pairs[2 * LANES];
    memcpy(pairs, &acc, sizeof pairs);
    for (int i = 0; i < 2 * LANES; i++) {
        int32_t pair = u[2 * i] * w[2 * i] + u[2 * i + 1] * w[2 * i + 1];
        pair = pair > INT16_MAX ? INT16_MAX : pair < INT16_MIN ? INT16_MIN : pair;
        pairs[i] += pair;
    }
    return load_sums(pairs);
}

// vpmaddwd by ones, and vpaddd
static inline sums widen(sums acc, sums sum) {
    int16_t pairs[2 * LANES];
    memcpy(pairs, &sum, sizeof pairs);
    for (int i = 0; i < 2 * LANES; i++) acc.lane[i / 2] += pairs[i];
    return acc;
}
#define widen widen
#endif
#define dot dot

// vpunpck{l,h}{bw,wd}: halves of every 128 bits, elements of n bytes in turns
static inline sums interleave(sums first, sums second, int half, int n) {
    const int8_t *a = (const int8_t *)&first, *b = (const int8_t *)&second;
    int8_t out[4 * LANES];
    for (int i = 0; i < 4 * LANES; i += 2 * n) {
        int from = i / 16 * 16 + half * 8 + i % 16 / 2;
        memcpy(out + i, a + from, n);
        memcpy(out + i + n, b + from, n);
    }
    return load_sums(out);
}
#define low8(a, b) interleave(a, b, 0, 1)
#define high8(a, b) interleave(a, b, 1, 1)
#define low16(a, b) interleave(a, b, 0, 2)
#define high16(a, b) interleave(a, b, 1, 2)
