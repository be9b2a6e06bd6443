/* JPEGs -> the crop's pixels, resized into the batch without the GIL: decoded by _baseline.c or libjpeg-turbo. And what else
 * is done to whole batches of bytes: reading, checksums, gathers.
 *
 * decode.py is the door to this file and its portable twin; both give the same pixels, bit for bit. Whatever is not
 * plain (another format, a rotated, damaged or suspicious JPEG) is left to the twin by answering LEFT for that sample.
 * The resize is the triangle filter widened by the reduction, across before down, rounded to 8 bits between them. A box
 * of whole pixels is cut out first and weighed as torch does, with as many bits as let every weight fit in 16; any other
 * box sees the pixels around it and is weighed as Pillow does, with 22 bits. It runs as a stream: each decoded row is
 * resampled across at once, and an output row is finished as soon as its last source row has come, so memory holds only
 * the rows under the filter.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jpeglib.h>
#include <jerror.h>

#include "_baseline.h"

#ifdef HAVE_XXHASH
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2_PATH 1
#endif

enum { DONE = 0, LEFT = 1, SHORT_READ = 2, READ_FAILED = 3 };

/* The same figures stand in decode.py, with their reasons. */
#define MAX_PIXELS 200000000.0
#define MAX_PIXELS_PER_BYTE 2048.0
#define MAX_SCANS 200
#define REDUCED_BEFORE_SCALING 4.0
#define SCALED_FROM 512

#define WIDE_BITS 22 /* of Pillow's weights */
#define LOW_BITS 11  /* a wide one is kept as two int16 halves: 16-bit multiply-add is fast, and sums stay exact */
#define HALVES(i) ((i) / 4 * 8 + (i) % 4) /* where the high half of weight i stands; the low half comes 4 later */
#define PADDING 16   /* bytes written past the end of a row */
#define ROWS_AT_ONCE 8 /* rows asked of libjpeg in one call; a few stay in the first cache */

/* ---- Resampling ------------------------------------------------------------------------------------------------ */

typedef struct {
    int outputs, groups;  /* groups of four weights kept per output: as many as the widest needs */
    int bits;             /* a weight of 1 is 1 << bits */
    int *first, *count;   /* (outputs,) first source pixel and number of them */
    int16_t *weights;     /* (outputs, groups, 2, 4): four high halves (0 where not wide), then low; 0 past count */
    void *memory;
    size_t room;
} Taps;

typedef struct {
    Taps across, down;
    unsigned char *ring;  /* (slots, pitch) source rows resampled across, the one numbered y in slot y % slots */
    const unsigned char **window;
    unsigned char *rows;  /* (ROWS_AT_ONCE, ...) decoded, 4 bytes a pixel and `padding` more */
    size_t ring_room, window_room, rows_room, pitch, padding;
    int slots, next;      /* next: output row to be finished */
    int top, bottom;      /* source rows under the filter */
    void (*across_rows)(const Taps *, const unsigned char *const[2], int, unsigned char *const[2]);
    void (*down_rows)(const unsigned char **, int, const int16_t *, int, size_t, unsigned char *);
} Resizer;

/* Memory kept between the pictures of a batch and only ever grown. */
static int grow(void **memory, size_t *room, size_t size) {
    if (*room >= size) return 1;
    void *larger = malloc(size);
    if (!larger) return 0;
    free(*memory);
    *memory = larger;
    *room = size;
    return 1;
}

/* The weights of `outputs` pixels that cover begin..end of `inputs` pixels; wide ones, or such as fit in 16 bits. */
static int weigh(Taps *taps, int inputs, float begin, float end, int outputs, int is_wide) {
    double scale = (double)(end - begin) / outputs, reach = scale < 1 ? 1 : scale, nearness = 1.0 / reach, largest = 0;
    size_t most = 2 * reach + 2; /* more than any output takes */
    size_t shares = (size_t)outputs * most, room = (size_t)outputs * ((most + 3) / 4) * 8;
    size_t size = shares * sizeof(double) + 2 * (size_t)outputs * sizeof(int) + room * sizeof(int16_t);
    if (!grow(&taps->memory, &taps->room, size)) return 0;
    double *share = taps->memory;
    taps->first = (int *)(share + shares);
    taps->count = taps->first + outputs;
    taps->weights = (int16_t *)(taps->count + outputs);
    taps->outputs = outputs;
    int widest = 1;
    for (int o = 0; o < outputs; o++, share += most) {
        double centre = begin + (o + 0.5) * scale, sum = 0;
        int first = (int)(centre - reach + 0.5), last = (int)(centre + reach + 0.5);
        if (first < 0) first = 0;
        if (first > inputs - 1) first = inputs - 1;
        if (last > inputs) last = inputs;
        if (last < first + 1) last = first + 1;
        if (last > first + (int)most) last = first + most;
        taps->first[o] = first;
        taps->count[o] = last - first;
        if (last - first > widest) widest = last - first;
        for (int i = 0; i < last - first; i++) {
            double away = fabs((i + first - centre + 0.5) * nearness);
            sum += share[i] = away < 1 ? 1 - away : 0;
        }
        for (int i = 0; i < last - first; i++) {
            share[i] = sum != 0 ? share[i] / sum : 0;
            if (share[i] > largest) largest = share[i];
        }
    }
    taps->bits = is_wide ? WIDE_BITS : 0;
    while (taps->bits < WIDE_BITS && (int)(0.5 + largest * (2 << taps->bits)) < 1 << 15) taps->bits++;
    taps->groups = (widest + 3) / 4;
    memset(taps->weights, 0, (size_t)outputs * taps->groups * 8 * sizeof(int16_t));
    share = taps->memory;
    for (int o = 0; o < outputs; o++, share += most) {
        int16_t *weights = taps->weights + (size_t)o * taps->groups * 8;
        for (int i = 0; i < taps->count[o]; i++) {
            int weight = (int)(0.5 + share[i] * (1 << taps->bits));
            weights[HALVES(i)] = is_wide ? weight >> LOW_BITS : 0;
            weights[HALVES(i) + 4] = is_wide ? weight & ((1 << LOW_BITS) - 1) : weight;
        }
    }
    return 1;
}

static uint32_t weight_of(const int16_t *weights, int i) {
    return ((uint32_t)weights[HALVES(i)] << LOW_BITS) + weights[HALVES(i) + 4];
}

static unsigned char rounded(uint32_t sum, int bits) {
    int value = (int32_t)(sum + (1u << bits >> 1)) >> bits;
    return value > 255 ? 255 : value < 0 ? 0 : value;
}

/* Two rows, 4 bytes a pixel beginning with pixel `left` -> twice (outputs, 3). Writes one byte past each end. */
static void across_portable(const Taps *taps, const unsigned char *const rows[2], int left,
                            unsigned char *const to[2]) {
    for (int k = 0; k < 2; k++)
        for (int o = 0; o < taps->outputs; o++) {
            const unsigned char *pixel = rows[k] + 4 * (size_t)(taps->first[o] - left);
            const int16_t *weights = taps->weights + (size_t)o * taps->groups * 8;
            uint32_t red = 0, green = 0, blue = 0;
            for (int i = 0; i < taps->count[o]; i++, pixel += 4) {
                uint32_t weight = weight_of(weights, i);
                red += weight * pixel[0];
                green += weight * pixel[1];
                blue += weight * pixel[2];
            }
            to[k][3 * o] = rounded(red, taps->bits);
            to[k][3 * o + 1] = rounded(green, taps->bits);
            to[k][3 * o + 2] = rounded(blue, taps->bits);
        }
}

/* `count` rows of `bytes` bytes -> their weighted sum. */
static void down_portable(const unsigned char **rows, int count, const int16_t *weights, int bits, size_t bytes,
                          unsigned char *to) {
    for (size_t at = 0; at < bytes; at += 64) {
        uint32_t sums[64] = {0};
        size_t n = bytes - at < 64 ? bytes - at : 64;
        for (int i = 0; i < count; i++) {
            uint32_t weight = weight_of(weights, i);
            for (size_t k = 0; k < n; k++) sums[k] += weight * rows[i][at + k];
        }
        for (size_t k = 0; k < n; k++) to[at + k] = rounded(sums[k], bits);
    }
}

#ifdef HAVE_AVX2_PATH
#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE __attribute__((target("avx2"), always_inline)) static inline

/* is_wide is a constant wherever these are inlined: without high halves, half of the work falls away. */
AVX2_INLINE __m256i settled(__m256i high, __m256i low, __m128i bits, __m256i half, int is_wide) {
    __m256i sum = is_wide ? _mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low) : low;
    return _mm256_sra_epi32(_mm256_add_epi32(sum, half), bits);
}

AVX2_INLINE __m256i pair_of(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, 4);
    return _mm256_set1_epi32(pair);
}

AVX2_INLINE void across_inline(const Taps *taps, const unsigned char *const rows[2], int left,
                               unsigned char *const to[2], int is_wide) {
    /* one row in each lane, 4 pixels a turn: two and two, paired by channel for the multiply-add */
    const __m256i front =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i back = _mm256_add_epi8(front, _mm256_set1_epi16(8));
    const __m128i bits = _mm_cvtsi32_si128(taps->bits);
    const __m256i half = _mm256_set1_epi32(1 << taps->bits >> 1);
    const unsigned char *upper = rows[0] - 4 * (ptrdiff_t)left, *lower = rows[1] - 4 * (ptrdiff_t)left;
    unsigned char *up = to[0], *low = to[1];
    const int *first = taps->first;
    const int16_t *weights = taps->weights;
    int groups = taps->groups; /* the same for all outputs: a loop whose length changed would be mispredicted */
    for (int o = taps->outputs; o--; up += 3, low += 3) {
        size_t at = 4 * (size_t)*first++;
        __m256i high_sum = _mm256_setzero_si256(), low_sum = _mm256_setzero_si256();
        for (int g = groups; g--; at += 16, weights += 8) {
            __m128i one = _mm_loadu_si128((const __m128i *)(upper + at));
            __m128i other = _mm_loadu_si128((const __m128i *)(lower + at));
            __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1);
            __m256i values = _mm256_shuffle_epi8(four, front);
            if (is_wide) high_sum = _mm256_add_epi32(high_sum, _mm256_madd_epi16(values, pair_of(weights)));
            low_sum = _mm256_add_epi32(low_sum, _mm256_madd_epi16(values, pair_of(weights + 4)));
            values = _mm256_shuffle_epi8(four, back);
            if (is_wide) high_sum = _mm256_add_epi32(high_sum, _mm256_madd_epi16(values, pair_of(weights + 2)));
            low_sum = _mm256_add_epi32(low_sum, _mm256_madd_epi16(values, pair_of(weights + 6)));
        }
        __m256i colours = settled(high_sum, low_sum, bits, half, is_wide);
        colours = _mm256_packus_epi16(_mm256_packs_epi32(colours, colours), colours);
        int32_t colour = _mm256_extract_epi32(colours, 0);
        memcpy(up, &colour, 4);
        colour = _mm256_extract_epi32(colours, 4);
        memcpy(low, &colour, 4);
    }
}

AVX2_INLINE void down_inline(const unsigned char **rows, int count, const int16_t *weights, int num_bits, size_t bytes,
                             unsigned char *to, int is_wide) {
    const __m128i bits = _mm_cvtsi32_si128(num_bits);
    const __m256i half = _mm256_set1_epi32(1 << num_bits >> 1);
    for (size_t at = 0; at < bytes; at += 16) {
        if (at > bytes - 16) at = bytes - 16; /* the last turn overlaps rather than runs over */
        __m256i h0 = _mm256_setzero_si256(), h1 = h0, l0 = h0, l1 = h0;
        for (int i = 0; i < count; i += 2) {
            /* past an odd count the weight is zero, so any row will do */
            __m128i upper = _mm_loadu_si128((const __m128i *)(rows[i] + at));
            __m128i lower = _mm_loadu_si128((const __m128i *)(rows[i + 1 < count ? i + 1 : i] + at));
            __m256i v0 = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(upper, lower));
            __m256i v1 = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(upper, lower));
            __m256i weight = pair_of(weights + HALVES(i));
            if (is_wide) h0 = _mm256_add_epi32(h0, _mm256_madd_epi16(v0, weight));
            if (is_wide) h1 = _mm256_add_epi32(h1, _mm256_madd_epi16(v1, weight));
            weight = pair_of(weights + HALVES(i) + 4);
            l0 = _mm256_add_epi32(l0, _mm256_madd_epi16(v0, weight));
            l1 = _mm256_add_epi32(l1, _mm256_madd_epi16(v1, weight));
        }
        h0 = settled(h0, l0, bits, half, is_wide);
        h1 = settled(h1, l1, bits, half, is_wide);
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(h0, h1), 0xD8);
        __m128i result = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(to + at), result);
    }
}

AVX2 static void across_avx2(const Taps *taps, const unsigned char *const rows[2], int left,
                             unsigned char *const to[2]) {
    if (taps->bits == WIDE_BITS) across_inline(taps, rows, left, to, 1);
    else across_inline(taps, rows, left, to, 0);
}

AVX2 static void down_avx2(const unsigned char **rows, int count, const int16_t *weights, int bits, size_t bytes,
                           unsigned char *to) {
    if (bytes < 16) down_portable(rows, count, weights, bits, bytes, to);
    else if (bits == WIDE_BITS) down_inline(rows, count, weights, bits, bytes, to, 1);
    else down_inline(rows, count, weights, bits, bytes, to, 0);
}
#endif

static int has_avx2(void) {
#ifdef HAVE_AVX2_PATH
    return __builtin_cpu_supports("avx2");
#else
    return 0;
#endif
}

/* Whether a box is of whole pixels, to be cut out first; for outputs one pixel wide see decode.py. */
static int is_cut(const double *box, int out_width) {
    for (int i = 0; i < 4; i++)
        if (box[i] != floor(box[i])) return 0;
    return out_width > 1;
}

/* Get ready to resize the box (top, left, height, width) of a (height, width) picture into (out_height, out_width). */
static int plan(Resizer *r, int height, int width, const double *box, int out_height, int out_width) {
    double top = box[0], left = box[1], reach = fmax(box[2] / out_height, 1);
    if (is_cut(box, out_width)) {
        r->top = top;
        r->bottom = top + box[2];
        if (!weigh(&r->across, box[3], 0, box[3], out_width, 0) || !weigh(&r->down, box[2], 0, box[2], out_height, 0))
            return 0;
        for (int o = 0; o < out_width; o++) r->across.first[o] += left;
    } else {
        r->top = fmax(floor(top - reach), 0);
        r->bottom = fmin(ceil(top + box[2] + reach), height);
        float begin = top - r->top, end = top - r->top + box[2];
        if (!weigh(&r->across, width, left, left + box[3], out_width, 1) ||
            !weigh(&r->down, r->bottom - r->top, begin, end, out_height, 1))
            return 0;
    }
    r->slots = 4 * r->down.groups + 2; /* two rows come before the oldest is let go */
    r->across_rows = across_portable;
    r->down_rows = down_portable;
#ifdef HAVE_AVX2_PATH
    if (has_avx2()) {
        r->across_rows = across_avx2;
        r->down_rows = down_avx2;
    }
#endif
    r->pitch = (size_t)out_width * 3 + PADDING;
    r->padding = 16 * (size_t)r->across.groups;
    r->next = 0;
    return grow((void **)&r->ring, &r->ring_room, r->pitch * r->slots) &&
           grow((void **)&r->window, &r->window_room, sizeof(*r->window) * r->slots);
}

/* Take rows y and y + 1 of those from `top` on (the first one alone if `count` is 1), whose first pixel given is number
 * `left`, and finish every output row that waited for them. */
static void feed(Resizer *r, const unsigned char *const rows[2], int count, int left, int y, unsigned char *out) {
    const unsigned char *const pair[2] = {rows[0], count > 1 ? rows[1] : rows[0]};
    unsigned char *const slots[2] = {r->ring + r->pitch * (y % r->slots), r->ring + r->pitch * ((y + 1) % r->slots)};
    size_t bytes = (size_t)r->across.outputs * 3;
    r->across_rows(&r->across, pair, left, slots);
    for (; r->next < r->down.outputs && r->down.first[r->next] + r->down.count[r->next] <= y + count; r->next++) {
        int first = r->down.first[r->next], window = r->down.count[r->next];
        const int16_t *weights = r->down.weights + (size_t)r->next * r->down.groups * 8;
        for (int i = 0; i < window; i++) r->window[i] = r->ring + r->pitch * ((first + i) % r->slots);
        r->down_rows(r->window, window, weights, r->down.bits, bytes, out + r->next * bytes);
    }
}

static void release(Resizer *r) {
    free(r->across.memory);
    free(r->down.memory);
    free(r->ring);
    free(r->window);
    free(r->rows);
}

/* ---- JPEG ------------------------------------------------------------------------------------------------------ */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf escape;
} Errors;

static void give_up(j_common_ptr jpeg) { longjmp(((Errors *)jpeg->err)->escape, 1); }

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

/* A warning is damage, but for the two that leave a complete picture (decode.py names them). */
static void judge(j_common_ptr jpeg, int level) {
    struct jpeg_error_mgr *err = jpeg->err;
    if (level >= 0 || err->msg_code == JWRN_JFIF_MAJOR) return;
    if (err->msg_code == JWRN_EXTRANEOUS_DATA && err->msg_parm.i[1] == 0xD9) return;
    give_up(jpeg);
}

static unsigned number(const unsigned char *at, int bytes, int little) {
    unsigned value = 0;
    for (int i = 0; i < bytes; i++) value = value << 8 | at[little ? bytes - 1 - i : i];
    return value;
}

/* Whether an EXIF segment in front of the frame asks for the picture to be turned or mirrored. */
static int is_turned(const unsigned char *jpeg, size_t size) {
    size_t at = 2;
    while (at + 4 <= size && jpeg[at] == 0xFF) {
        unsigned marker = jpeg[at + 1];
        if (marker == 0xFF || marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {
            at += marker == 0xFF ? 1 : 2;
            continue;
        }
        size_t length = number(jpeg + at + 2, 2, 0);
        if (marker == 0xDA || marker == 0xD9 || length < 2 || at + 2 + length > size) return 0;
        if (marker == 0xE1 && length >= 8 + 14 && !memcmp(jpeg + at + 4, "Exif\0", 6)) {
            const unsigned char *tiff = jpeg + at + 10;
            size_t end = length - 8;
            int little = tiff[0] == 'I';
            size_t entry = number(tiff + 4, 4, little);
            unsigned entries = entry <= end - 2 ? number(tiff + entry, 2, little) : 0;
            for (entry += 2; entries-- && entry + 12 <= end; entry += 12)
                if (number(tiff + entry, 2, little) == 0x0112 && number(tiff + entry + 8, 2, little) != 1) return 1;
        }
        at += 2 + length;
    }
    return 0;
}

/* The portable path reads to the end and so notices where it is missing; this one may stop long before. */
static int has_end(const unsigned char *from, const unsigned char *end) {
    for (const unsigned char *at = end - 2; at >= from; at--)
        if (at[0] == 0xFF && at[1] == 0xD9) return 1;
    return 0;
}

static int count_scans(const unsigned char *at, const unsigned char *end) {
    int scans = 0;
    while ((at = memchr(at, 0xFF, end - at)) && ++at < end) scans += *at == 0xDA;
    return scans;
}

static void cmyk_to_rgb(unsigned char *row, int pixels) {
    for (; pixels--; row += 4)
        for (int c = 0; c < 3; c++) {
            unsigned product = (255 - row[c]) * row[3] + 128;
            row[c] = row[3] - (((product >> 8) + product) >> 8);
        }
}

/* What of a picture is wanted, and how much smaller it may be decoded. */
typedef struct {
    double box[4]; /* top, left, height, width of it in the picture as it is decoded */
    int scale;     /* 1, 2, 4 or 8: the reduction while decoding */
    int is_whole;  /* all of it, as large as it is */
} Wanted;

/* box: of a (tall, wide) picture, or NULL. 0 for what the portable path shall look at. */
static int want(Wanted *w, int tall, int wide, size_t bytes, const double *box, int height, int width, int is_packed) {
    double pixels = (double)tall * wide, top = 0, left = 0, bottom = tall, right = wide;
    if (pixels > MAX_PIXELS || (!is_packed && pixels > MAX_PIXELS_PER_BYTE * bytes)) return 0;
    if (box) {
        if (!(isfinite(box[0]) && isfinite(box[1]) && isfinite(box[2]) && isfinite(box[3]))) return 0;
        top = fmax(box[0], 0);
        left = fmax(box[1], 0);
        bottom = fmin(box[0] + box[2], tall);
        right = fmin(box[1] + box[3], wide);
        if (!(bottom > top && right > left)) return 0;
    }
    w->is_whole = bottom - top == height && right - left == width && height == tall && width == wide;
    double reduction = fmin((bottom - top) / height, (right - left) / width);
    w->scale = 1;
    while ((tall >= SCALED_FROM || wide >= SCALED_FROM) && w->scale < 8 && reduction >= REDUCED_BEFORE_SCALING * w->scale)
        w->scale *= 2;
    double area[4] = {top / w->scale, left / w->scale, (bottom - top) / w->scale, (right - left) / w->scale};
    memcpy(w->box, area, sizeof(area));
    return 1;
}

typedef struct {
    int top, bottom, left, right; /* what the resizer takes of the decoded picture */
} Area;

static int plan_area(Resizer *r, Area *area, int tall, int wide, const double *box, int height, int width) {
    if (!plan(r, tall, wide, box, height, width)) return 0;
    const Taps *across = &r->across, *down = &r->down;
    area->left = across->first[0];
    area->right = across->first[width - 1] + across->count[width - 1];
    area->top = r->top + down->first[0];
    area->bottom = r->top + down->first[height - 1] + down->count[height - 1];
    return 1;
}

/* Room for ROWS_AT_ONCE rows of `columns` pixels. */
static int lay_rows(Resizer *r, int columns, unsigned char *rows[ROWS_AT_ONCE]) {
    size_t pitch = ((size_t)columns * 4 + r->padding + BASELINE_PADDING + 31) / 32 * 32;
    if (!grow((void **)&r->rows, &r->rows_room, pitch * ROWS_AT_ONCE + 64)) return 0;
    /* rows on a 32-byte boundary are stored past the cache by libjpeg-turbo's colour conversion; ours are read next */
    rows[0] = r->rows + 40 - (uintptr_t)r->rows % 32;
    for (int k = 1; k < ROWS_AT_ONCE; k++) rows[k] = rows[k - 1] + pitch;
    return 1;
}

static void feed_all(Resizer *r, unsigned char **rows, int count, int left, int y, unsigned char *out) {
    for (int k = 0; k < count; k += 2)
        feed(r, (const unsigned char *const *)rows + k, count - k > 1 ? 2 : 1, left, y + k - r->top, out);
}

static int decode_rows(struct jpeg_decompress_struct *jpeg, Resizer *r, const double *box, unsigned char *out,
                       int height, int width) {
    Area area;
    unsigned char *rows[ROWS_AT_ONCE];
    int full_width = jpeg->output_width;
    if (!plan_area(r, &area, jpeg->output_height, full_width, box, height, width)) return LEFT;
    /* pixels beside the cut are upsampled without their neighbours: a few more columns keep ours exact */
    int left = area.left > 2 ? area.left - 2 : 0, right = area.right + 2 < full_width ? area.right + 2 : full_width;
    JDIMENSION begin = left, columns = right - left;
    if (columns < (JDIMENSION)full_width) jpeg_crop_scanline(jpeg, &begin, &columns);
    if (!lay_rows(r, columns, rows)) return LEFT;
    if (area.top > 0) jpeg_skip_scanlines(jpeg, area.top);
    while ((int)jpeg->output_scanline < area.bottom) {
        int y = jpeg->output_scanline, wanted = area.bottom - y < ROWS_AT_ONCE ? area.bottom - y : ROWS_AT_ONCE;
        int got = jpeg_read_scanlines(jpeg, rows, wanted);
        if (got < 1) return LEFT;
        for (int k = 0; k < got && jpeg->out_color_space == JCS_CMYK; k++) cmyk_to_rgb(rows[k], columns);
        feed_all(r, rows, got, begin, y, out);
    }
    return DONE;
}

static int copy_rows(struct jpeg_decompress_struct *jpeg, unsigned char *out) {
    size_t pitch = (size_t)jpeg->output_width * 3;
    while (jpeg->output_scanline < jpeg->output_height) {
        JSAMPROW rows[ROWS_AT_ONCE];
        JDIMENSION left = jpeg->output_height - jpeg->output_scanline;
        JDIMENSION wanted = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
        for (JDIMENSION k = 0; k < wanted; k++) rows[k] = out + pitch * (jpeg->output_scanline + k);
        if (jpeg_read_scanlines(jpeg, rows, wanted) < 1) return LEFT;
    }
    return DONE;
}

/* By libjpeg-turbo, whatever kind it is. DONE, or LEFT for whatever the portable path shall look at. */
static int decode_any(const unsigned char *payload, size_t size, const double *box, Resizer *r, unsigned char *out,
                      int height, int width) {
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = give_up;
    errors.base.emit_message = judge;
    errors.base.output_message = say_nothing;
    if (setjmp(errors.escape)) {
        jpeg_destroy_decompress(&jpeg);
        return LEFT;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, payload, size);
    jpeg_read_header(&jpeg, TRUE);
    int answer = LEFT;
    Wanted w;
    if (!want(&w, jpeg.image_height, jpeg.image_width, size, box, height, width, jpeg.arith_code)) goto end;
    if (!has_end(jpeg.src->next_input_byte, payload + size)) goto end;
    if (jpeg.progressive_mode && count_scans(payload, payload + size) > MAX_SCANS) goto end;
    int cmyk = jpeg.num_components == 4, copies = w.is_whole && !cmyk;
    jpeg.scale_num = 1;
    jpeg.scale_denom = w.scale;
    jpeg.out_color_space = cmyk ? JCS_CMYK : copies ? JCS_EXT_RGB : JCS_EXT_RGBX;
    jpeg_start_decompress(&jpeg);
    answer = copies ? copy_rows(&jpeg, out) : decode_rows(&jpeg, r, w.box, out, height, width);
end:
    jpeg_destroy_decompress(&jpeg);
    return answer;
}

/* By _baseline.c. DONE, or LEFT for whatever libjpeg-turbo shall look at. */
static int decode_baseline(Baseline *b, const unsigned char *payload, size_t size, const double *box, Resizer *r,
                           unsigned char *out, int height, int width) {
    int tall, wide, got;
    Wanted w;
    unsigned char *rows[ROWS_AT_ONCE];
    const unsigned char *scan = baseline_open(b, payload, size, &tall, &wide);
    if (!scan || !want(&w, tall, wide, size, box, height, width, 0) || w.scale > 1 || !has_end(scan, payload + size))
        return LEFT;
    if (w.is_whole) {
        if (!baseline_start(b, 0, height, 0, width, 3)) return LEFT;
        for (int y = 0; y < height; y += got) {
            for (int k = 0; k < ROWS_AT_ONCE; k++) rows[k] = out + (size_t)(y + k) * width * 3;
            if (!(got = baseline_read(b, rows, ROWS_AT_ONCE))) return LEFT;
        }
        return DONE;
    }
    Area area;
    if (!plan_area(r, &area, tall, wide, w.box, height, width) || !lay_rows(r, area.right - area.left, rows) ||
        !baseline_start(b, area.top, area.bottom, area.left, area.right, 4))
        return LEFT;
    for (int y = area.top; y < area.bottom; y += got) {
        if (!(got = baseline_read(b, rows, ROWS_AT_ONCE))) return LEFT;
        feed_all(r, rows, got, area.left, y, out);
    }
    return DONE;
}

/* box: (top, left, height, width) or NULL. Answers DONE, or LEFT for whatever the portable path shall look at. */
static int decode_jpeg(Baseline *b, const unsigned char *payload, size_t size, const double *box, Resizer *r,
                       unsigned char *out, int height, int width, Py_ssize_t *num_baseline) {
    if (size < 4 || payload[0] != 0xFF || payload[1] != 0xD8 || is_turned(payload, size)) return LEFT;
    if (b && decode_baseline(b, payload, size, box, r, out, height, width) == DONE) {
        ++*num_baseline;
        return DONE;
    }
    return decode_any(payload, size, box, r, out, height, width);
}

/* ---- Python ---------------------------------------------------------------------------------------------------- */

static PyObject *wrong_size(const char *what) {
    return PyErr_Format(PyExc_ValueError, "%s has the wrong number of bytes", what);
}

static int is_size(int height, int width) { return height > 0 && width > 0 && height < 65536 && width < 65536; }

PyDoc_STRVAR(decode_doc,
"decode(source, starts, sizes, boxes, out, height, width, status)\n\n"
"Decode payload i = source[starts[i] : starts[i] + sizes[i]] into out[i], for all i, without the GIL.\n"
"starts: (N,) uint64, sizes: (N,) uint32, boxes: (N, 4) float64 or None, out: (N, height, width, 3) uint8,\n"
"status: (N,) uint8. Samples whose status is not 0 on entry are passed over; on return 0 says done, 1 left to others.\n"
"Returns how many were baseline JPEGs for which libjpeg-turbo was not needed.");

static PyObject *py_decode(PyObject *self, PyObject *args) {
    Py_buffer source, starts, sizes, boxes, out, status;
    int height, width, fits = 0;
    Py_ssize_t num_baseline = 0;
    if (!PyArg_ParseTuple(args, "y*y*y*z*w*iiw*", &source, &starts, &sizes, &boxes, &out, &height, &width, &status))
        return NULL;
    Py_ssize_t n = status.len;
    const uint64_t *start = starts.buf;
    const uint32_t *size = sizes.buf;
    unsigned char *state = status.buf;
    if (starts.len != n * 8) wrong_size("starts");
    else if (sizes.len != n * 4) wrong_size("sizes");
    else if (boxes.buf && boxes.len != n * 32) wrong_size("boxes");
    else if (!is_size(height, width) || out.len != n * 3 * height * width) wrong_size("out");
    else {
        fits = 1;
        for (Py_ssize_t i = 0; i < n; i++)
            if (start[i] > (uint64_t)source.len || size[i] > source.len - start[i]) fits = 0;
        if (!fits) wrong_size("source");
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        Resizer resizer = {0};
        Baseline *baseline = baseline_new();
        for (Py_ssize_t i = 0; i < n; i++)
            if (!state[i])
                state[i] = decode_jpeg(baseline, (unsigned char *)source.buf + start[i], size[i],
                                       boxes.buf ? (double *)boxes.buf + 4 * i : NULL, &resizer,
                                       (unsigned char *)out.buf + (size_t)i * 3 * height * width, height, width,
                                       &num_baseline);
        baseline_free(baseline);
        release(&resizer);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&sizes);
    if (boxes.buf) PyBuffer_Release(&boxes);
    PyBuffer_Release(&out);
    PyBuffer_Release(&status);
    return fits ? PyLong_FromSsize_t(num_baseline) : NULL;
}

PyDoc_STRVAR(read_doc,
"read(fds, offsets, sizes, into, starts, status)\n\n"
"Read sizes[i] bytes at offsets[i] of file fds[i] to into[starts[i]:], for all i, without the GIL.\n"
"fds: (N,) int32, offsets and starts: (N,) uint64, sizes: (N,) uint32, bytes. status: (N,) uint8: 0 read, 2 the file\n"
"ends before, 3 the system refused.");

static PyObject *py_read(PyObject *self, PyObject *args) {
    Py_buffer fds, offsets, sizes, into, starts, status;
    PyObject *result = Py_None;
    if (!PyArg_ParseTuple(args, "y*y*y*w*y*w*", &fds, &offsets, &sizes, &into, &starts, &status)) return NULL;
    Py_ssize_t n = status.len;
    const int32_t *fd = fds.buf;
    const uint64_t *offset = offsets.buf, *start = starts.buf;
    const uint32_t *size = sizes.buf;
    unsigned char *state = status.buf;
    if (fds.len != n * 4 || offsets.len != n * 8 || sizes.len != n * 4 || starts.len != n * 8)
        result = wrong_size("fds, offsets, sizes or starts");
    for (Py_ssize_t i = 0; result && i < n; i++)
        if (start[i] > (uint64_t)into.len || size[i] > into.len - start[i]) result = wrong_size("into");
    if (result) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < n; i++) {
            size_t done = 0;
            state[i] = offset[i] > INT64_MAX ? SHORT_READ : DONE;
            while (!state[i] && done < size[i]) {
                ssize_t got = pread(fd[i], (char *)into.buf + start[i] + done, size[i] - done, offset[i] + done);
                if (got > 0) done += got;
                else if (got == 0) state[i] = SHORT_READ;
                else if (errno != EINTR) state[i] = READ_FAILED;
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&fds);
    PyBuffer_Release(&offsets);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&into);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&status);
    return Py_XNewRef(result);
}

#ifdef HAVE_XXHASH
PyDoc_STRVAR(checksum_doc,
"checksum(source, starts, sizes, into)\n\n"
"xxh3_64 of source[starts[i] : starts[i] + sizes[i]] to into[i], (N,) uint64, for all i, without the GIL.");

static PyObject *py_checksum(PyObject *self, PyObject *args) {
    Py_buffer source, starts, sizes, into;
    PyObject *result = Py_None;
    if (!PyArg_ParseTuple(args, "y*y*y*w*", &source, &starts, &sizes, &into)) return NULL;
    Py_ssize_t n = into.len / 8;
    const uint64_t *start = starts.buf;
    const uint32_t *size = sizes.buf;
    if (starts.len != n * 8 || sizes.len != n * 4) result = wrong_size("starts or sizes");
    for (Py_ssize_t i = 0; result && i < n; i++)
        if (start[i] > (uint64_t)source.len || size[i] > source.len - start[i]) result = wrong_size("source");
    if (result) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < n; i++)
            ((uint64_t *)into.buf)[i] = XXH3_64bits((char *)source.buf + start[i], size[i]);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&into);
    return Py_XNewRef(result);
}
#endif

PyDoc_STRVAR(resize_doc,
"resize(source, source_height, source_width, box, out, height, width)\n\n"
"Resize the box (top, left, height, width) of a (source_height, source_width, 3) uint8 picture into out.");

static PyObject *py_resize(PyObject *self, PyObject *args) {
    Py_buffer source, out;
    int from_height, from_width, height, width, fits = 0;
    double box[4];
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*ii(dddd)w*ii", &source, &from_height, &from_width, box, box + 1, box + 2, box + 3,
                          &out, &height, &width))
        return NULL;
    if (from_height < 1 || from_width < 1 || source.len != (Py_ssize_t)3 * from_height * from_width)
        wrong_size("source");
    else if (!is_size(height, width) || out.len != (Py_ssize_t)3 * height * width) wrong_size("out");
    else if (!(box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 && box[0] + box[2] <= from_height &&
               box[1] + box[3] <= from_width))
        PyErr_SetString(PyExc_ValueError, "box lies outside the picture");
    else {
        Py_BEGIN_ALLOW_THREADS
        Resizer r = {0};
        fits = plan(&r, from_height, from_width, box, height, width) &&
               grow((void **)&r.rows, &r.rows_room, 2 * ((size_t)from_width * 4 + r.padding));
        const unsigned char *const rows[2] = {r.rows, r.rows + (size_t)from_width * 4 + r.padding};
        for (int y = r.top; fits && y < r.bottom; y += 2) {
            int count = r.bottom - y < 2 ? 1 : 2;
            for (int k = 0; k < count; k++) {
                const unsigned char *pixel = (unsigned char *)source.buf + (size_t)(y + k) * from_width * 3;
                for (int x = 0; x < from_width; x++) memcpy((char *)rows[k] + 4 * (size_t)x, pixel + 3 * (size_t)x, 3);
            }
            feed(&r, rows, count, 0, y - r.top, out.buf);
        }
        release(&r);
        Py_END_ALLOW_THREADS
        if (fits) result = Py_None;
        else PyErr_NoMemory();
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    return Py_XNewRef(result);
}

PyDoc_STRVAR(gather_doc,
"gather(source, row_bytes, samples, out)\n\n"
"Row samples[i] of source, an array of rows of row_bytes bytes, to out[i], for all i, without the GIL.\n"
"samples: (N,) int64; out: N * row_bytes bytes.");

static PyObject *py_gather(PyObject *self, PyObject *args) {
    Py_buffer source, samples, out;
    Py_ssize_t row;
    PyObject *result = Py_None;
    if (!PyArg_ParseTuple(args, "y*ny*w*", &source, &row, &samples, &out)) return NULL;
    Py_ssize_t n = samples.len / 8, rows = row > 0 ? source.len / row : 0;
    const int64_t *sample = samples.buf;
    if (row < 1 || samples.len % 8 || out.len / row != n || out.len % row) result = wrong_size("out");
    for (Py_ssize_t i = 0; result && i < n; i++)
        if (sample[i] < 0 || sample[i] >= rows) result = wrong_size("source");
    if (result) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < n; i++) {
#ifdef __GNUC__ /* rows lie anywhere, which no processor foresees: twice as fast where the next but one is fetched ahead */
            const char *next = (char *)source.buf + (i + 2 < n ? sample[i + 2] * row : 0);
            for (Py_ssize_t k = 0; i + 2 < n && k < row; k += 64) __builtin_prefetch(next + k, 0, 1);
#endif
            memcpy((char *)out.buf + i * row, (char *)source.buf + sample[i] * row, row);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&samples);
    PyBuffer_Release(&out);
    return Py_XNewRef(result);
}

PyDoc_STRVAR(fence_doc,
"fence()\n\n"
"What was written before is seen by all processors before what is written after, and read likewise.");

static PyObject *py_fence(PyObject *self, PyObject *none) {
    atomic_thread_fence(memory_order_seq_cst);
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"decode", py_decode, METH_VARARGS, decode_doc},
    {"read", py_read, METH_VARARGS, read_doc},
#ifdef HAVE_XXHASH
    {"checksum", py_checksum, METH_VARARGS, checksum_doc},
#endif
    {"resize", py_resize, METH_VARARGS, resize_doc},
    {"gather", py_gather, METH_VARARGS, gather_doc},
    {"fence", py_fence, METH_NOARGS, fence_doc},
    {NULL, NULL, 0, NULL},
};

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

static int fill(PyObject *module) {
    return PyModule_AddStringConstant(module, "LIBJPEG_TURBO", TEXT(LIBJPEG_TURBO_VERSION)) ||
           PyModule_AddStringConstant(module, "VECTORS", has_avx2() ? "AVX2" : "portable");
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, fill},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Partial JPEG decoding and gathers of rows; see decode.py and cache.py.", 0, methods, slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
