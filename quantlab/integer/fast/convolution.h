// A convolution as an implicit matrix product: which windows, which channels, in what order. What is
// multiplied, 16 bits or 8, is a Kernel's.

#include <stdlib.h>

typedef struct {
    int64_t images, height, width, channels;  // of the input
    int64_t rows, columns, outputs;           // of the output
    int64_t groups, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
    int64_t zero_point, depthwise;
    int64_t band_images, band_rows;  // what one task computes
    // a row of the kernel touches `stretches` runs of `stretch` neighbouring codes, a multiple of
    // what one instruction sums
    int64_t stretches, stretch;
    int64_t weights;  // of one output, padding included
    // bytes alone: the least code, which becomes 0; whether codes are read where they are; products
    // that 16 bits hold
    int64_t least, in_place, run;
} Shape;

enum { MOST_PIXELS = 16 };

// Where a tile's results go: pixel i < pixels, n channels from `channel` of the constants.
typedef struct {
    const Output *output;
    int64_t channel, n, pixels, pitch;  // pitch: from pixel to pixel
    int8_t *codes;                      // or NULL
    int32_t *logits;
} Result;

// An inner loop: `pixels` windows x `outputs` channels,
//     acc[i][j] = bias[j] + sum of window i times w[j]
// size: bytes of a code in the windows. fill: writes n codes as the kernel reads them; pad: n codes
// of padding. row, column: how far the kernel's next row and column lie, in codes.
typedef struct {
    int pixels, outputs, size;
    void (*fill)(const Shape *s, const int8_t *codes, int64_t n, void *out);
    void (*pad)(const Shape *s, int64_t n, void *out);
    void (*tile)(const Shape *s, const void *const *window, int64_t row, int64_t column,
                 const void *w, const int32_t *bias, const Result *result);
} Kernel;

static inline void store_tile(const int32_t *acc, int outputs, const Result *r) {
    for (int64_t i = 0; i < r->pixels; i++, acc += outputs) {
        if (r->logits) memcpy(r->logits + i * r->pitch, acc, 4 * r->n);
        else for (int64_t c = 0; c < r->n; c += OUT)
            store(acc + c, r->output, r->channel + c, r->codes + i * r->pitch + c, r->n - c);
    }
}

// One image's rows first .. first + rows as the kernel reads them, padded: [rows][width][channels].
static void copy(const Kernel *k, const Shape *s, const int8_t *x, int64_t first, int64_t rows,
                 int64_t width, char *out) {
    int64_t c = s->channels, inside = s->width < width - s->left ? s->width : width - s->left;
    for (int64_t r = first; r < first + rows; r++, out += width * c * k->size) {
        if (r < 0 || r >= s->height || inside <= 0) {
            k->pad(s, width * c, out);
            continue;
        }
        char *in = out + s->left * c * k->size;
        k->pad(s, s->left * c, out);
        k->fill(s, x + r * s->width * c, inside * c, in);
        k->pad(s, (width - s->left - inside) * c, in + inside * c * k->size);
    }
}

// Tasks begin .. end of a convolution; a task is a band of rows, or a few whole images. Of codes
// and logits one is given. Returns 0, or 1 where memory is short.
// weight: [groups][outputs of a group / k->outputs][one tile's]
static int convolve(const Kernel *k, const Shape *s, const int8_t *x, const char *weight,
                    const int32_t *bias, const int32_t *constants, int8_t *codes, int32_t *logits,
                    int64_t begin, int64_t end) {
    int64_t width = (s->columns - 1) * s->stride_w + (s->kernel_w - 1) * s->dilation_w + 1;
    int64_t height = (s->band_rows - 1) * s->stride_h + (s->kernel_h - 1) * s->dilation_h + 1;
    if (s->in_place) width = s->width;
    int64_t row = s->dilation_h * width * s->channels, column = s->dilation_w * s->channels;
    int64_t groups = s->depthwise ? 1 : s->groups, per_group = s->outputs / groups;
    int64_t size = s->weights * k->outputs * k->size;
    int64_t padded = (per_group + k->outputs - 1) / k->outputs * k->outputs;
    int64_t pitch = s->height * s->width * s->channels;  // from image to image
    int64_t wide_pitch = height * width * s->channels * k->size;  // the same in `wide`
    int64_t bands = (s->rows + s->band_rows - 1) / s->band_rows;
    Output o = logits ? (Output){0} : unpack(constants, groups * padded);
    int64_t windows = s->band_images * s->band_rows * s->columns;
    // behind the last code as much as a vector reads beyond it
    char *wide = malloc(s->in_place ? 1 : s->band_images * wide_pitch + 64);
    const char **window = malloc(sizeof *window * (windows + MOST_PIXELS));
    for (int64_t task = begin; wide && window && task < end; task++) {
        int64_t image = task / bands * s->band_images, first = task % bands * s->band_rows;
        int64_t pixels = 0, top = first * s->stride_h - s->top;
        int64_t images = s->images - image < s->band_images ? s->images - image : s->band_images;
        int64_t rows = s->rows - first < s->band_rows ? s->rows - first : s->band_rows;
        for (int64_t i = 0; i < images; i++) {
            const int8_t *source = x + (image + i) * pitch;
            char *in = wide + i * wide_pitch;
            if (s->in_place) in = (char *)source + top * width * s->channels;
            else copy(k, s, source, top, height, width, in);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < s->columns; c++)
                    window[pixels++] = in + (r * s->stride_h * width + c * s->stride_w)
                                       * s->channels * k->size;
        }
        // so that the last tile is a whole one
        for (int i = 0; i < k->pixels; i++) window[pixels + i] = window[pixels - 1];
        int64_t start = (image * s->rows + first) * s->columns;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t n = 0; n < per_group; n += k->outputs) {
                int64_t channel = g * padded + n;
                int64_t left = per_group - n < k->outputs ? per_group - n : k->outputs;
                int64_t from = (s->depthwise ? n : g * (s->channels / s->groups)) * k->size;
                const char *w = weight + channel / k->outputs * size;
                for (int64_t p = 0; p < pixels; p += k->pixels) {
                    const void *in[MOST_PIXELS];
                    int64_t at = (start + p) * s->outputs + g * per_group + n;
                    Result result = {&o, channel, left, pixels - p, s->outputs,
                                     logits ? NULL : codes + at, logits ? logits + at : NULL};
                    if (result.pixels > k->pixels) result.pixels = k->pixels;
                    for (int i = 0; i < k->pixels; i++) in[i] = window[p + i] + from;
                    k->tile(s, in, row, column, w, bias + channel, &result);
                }
            }
    }
    int failed = !wide || !window;
    free(wide);
    free(window);
    return failed;
}
