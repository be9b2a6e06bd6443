/* Resizing rows as they come: a triangle (bilinear) or Keys' cubic (bicubic), widened by the reduction; across before down,
 * rounded to 8 bits between, where a cubic's overshoot is cut off.
 *
 * A box of whole pixels is cut out first and weighed as torch does, with as many bits as let every weight fit in 16; any
 * other box sees the pixels around it and is weighed as Pillow does, with 22 bits. It runs as a stream: each decoded row is
 * resampled across at once, and an output row is finished as soon as its last source row has come, so memory holds only
 * the rows under the filter. Included by _native.c.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2_PATH 1
#endif

#define WIDE_BITS 22 /* of Pillow's weights */
#define LOW_BITS 11  /* a wide one is kept as two int16 halves: 16-bit multiply-add is fast, and sums stay exact */
#define HALVES(i) ((i) / 4 * 8 + (i) % 4) /* where the high half of weight i stands; the low half comes 4 later */
#define PADDING 16   /* bytes written past the end of a row */

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
    int is_cubic;         /* what the pixels are weighed by; the caller's to set */
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

/* Of a pixel so far away, 0 or more; Keys 1981 with a = -0.5, as Pillow has it, and torch where it antialiases. */
static double weight_at(double away, int is_cubic) {
    if (!is_cubic) return away < 1 ? 1 - away : 0;
    if (away < 1) return (1.5 * away - 2.5) * away * away + 1;
    return away < 2 ? (((away - 5) * away + 8) * away - 4) * -0.5 : 0;
}

/* The weights of `outputs` pixels that cover begin..end of `inputs` pixels; wide ones, or such as fit in 16 bits. */
static int weigh(Taps *taps, int inputs, float begin, float end, int outputs, int is_wide, int is_cubic) {
    double scale = (double)(end - begin) / outputs, stretch = scale < 1 ? 1 : scale, nearness = 1.0 / stretch, largest = 0;
    double reach = is_cubic ? 2 * stretch : stretch;
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
            sum += share[i] = weight_at(fabs((i + first - centre + 0.5) * nearness), is_cubic);
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
            int weight = (int)((share[i] < 0 ? -0.5 : 0.5) + share[i] * (1 << taps->bits));
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

/* Get ready to resize the box (top, left, height, width) of a (height, width) picture into (out_height, out_width), by the
 * filter that r->is_cubic says. */
static int plan(Resizer *r, int height, int width, const double *box, int out_height, int out_width) {
    double top = box[0], left = box[1], reach = (1 + r->is_cubic) * fmax(box[2] / out_height, 1);
    if (is_cut(box, out_width)) {
        r->top = top;
        r->bottom = top + box[2];
        if (!weigh(&r->across, box[3], 0, box[3], out_width, 0, r->is_cubic) ||
            !weigh(&r->down, box[2], 0, box[2], out_height, 0, r->is_cubic))
            return 0;
        for (int o = 0; o < out_width; o++) r->across.first[o] += left;
    } else {
        r->top = fmax(floor(top - reach), 0);
        r->bottom = fmin(ceil(top + box[2] + reach), height);
        float begin = top - r->top, end = top - r->top + box[2];
        if (!weigh(&r->across, width, left, left + box[3], out_width, 1, r->is_cubic) ||
            !weigh(&r->down, r->bottom - r->top, begin, end, out_height, 1, r->is_cubic))
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
