// How many values each bin of a histogram holds. Compiled and called by counting.py.
//
//   bin = ceil(x / width) - 1 - first      (width a power of two; zeros apart)

#include <stdint.h>
#include <string.h>

enum {
    MOST_BINS = 4112,
    BLOCK = 1024,  // values whose bins are computed at once, by vector instructions
    // values that a thread takes at a time: of every two, one goes to each of two tables, and 16
    // bits hold it
    PART = 126 * BLOCK,
    PLACES = 16,  // where zeros are counted, in turns: they are many, and each would wait for the last
    ROOM = MOST_BINS + PLACES + 1
};

// counts: int64 [bins + 2], the last two for zeros and for values outside the bins.
typedef struct {
    const float *x;
    int64_t n, taken;
    float width, per_width;  // 1 / width
    int64_t first, bins;
    int64_t *counts;
} Work;

// Zeros go to bins .. bins + PLACES - 1, what is outside to bins + PLACES.
static inline void find_bins(const float *x, int n, const Work *w, uint16_t *place) {
    float width = w->width, per_width = w->per_width;
    int32_t first = w->first, zeros = w->bins;
    uint32_t outside = zeros + PLACES, bins = zeros;
    for (int i = 0; i < n; i++) {
        int32_t whole = (int32_t)(x[i] * per_width);  // towards zero, also where this underflows
        uint32_t bin = whole + (x[i] > whole * width) - 1 - first;
        uint32_t zero = -(uint32_t)(x[i] == 0), in_turn = zeros + i % PLACES;
        bin |= -(uint32_t)(bin >= bins);
        bin ^= (bin ^ in_turn) & zero;  // not a branch that would be mispredicted
        place[i] = bin < outside ? bin : outside;
    }
}

// Adds the counts of n <= PART values. Two tables, as neighbours are often equal.
static void count_part(const float *x, int64_t n, const Work *w, int64_t *sums) {
    uint16_t table[ROOM][2], place[BLOCK];
    memset(table, 0, sizeof table);
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int many = n - begin < BLOCK ? n - begin : BLOCK, i = 0;
        find_bins(x + begin, many, w, place);
        for (; i + 8 <= many; i += 8) {
            table[place[i]][0]++, table[place[i + 1]][1]++;
            table[place[i + 2]][0]++, table[place[i + 3]][1]++;
            table[place[i + 4]][0]++, table[place[i + 5]][1]++;
            table[place[i + 6]][0]++, table[place[i + 7]][1]++;
        }
        for (; i < many; i++) table[place[i]][0]++;
    }
    for (int64_t i = 0; i <= w->bins + PLACES; i++) sums[i] += table[i][0] + table[i][1];
}

// Takes parts until none is left: to be called by several threads for the same work.
int count(Work *w) {
    int64_t sums[ROOM] = {0}, bins = w->bins, begin;
    if (bins > MOST_BINS) return 1;
    while ((begin = __atomic_fetch_add(&w->taken, PART, __ATOMIC_RELAXED)) < w->n)
        count_part(w->x + begin, w->n - begin < PART ? w->n - begin : PART, w, sums);
    for (int64_t i = 0; i <= bins + PLACES; i++) {
        int64_t to = i < bins ? i : i < bins + PLACES ? bins : bins + 1;
        if (sums[i]) __atomic_fetch_add(&w->counts[to], sums[i], __ATOMIC_RELAXED);
    }
    return 0;
}
