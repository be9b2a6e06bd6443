/* Baseline JPEGs, as most photographs are, decoded only where a crop needs them; for processors with AVX2.
 *
 * libjpeg-turbo spends most of its time on a photograph on Huffman codes, and on a small picture on getting ready. Here
 * two coefficients take one look into a table and no branch that chance decides, blocks beside the crop are only passed
 * over, and tables are kept while pictures repeat them. The pixels are libjpeg-turbo's, bit for bit: every sum is exact,
 * and rounded where it rounds. A picture with anything out of the ordinary (progressive, restarts, other samplings, a code
 * that does not exist, sums that 16 bits would not hold) is not decoded here but left to libjpeg, whose verdict counts.
 * On other processors libjpeg-turbo's own vectors are faster than this file without any.
 *
 * ITU-T T.81 (1992): markers in annex B, Huffman decoding in annex F.2.
 */
#include "_baseline.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h> /* before the line that turns the rest of this file into AVX2 */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi2")
#endif
#include "_codes.h"
#include "_samples.h"

enum { SPARE = 1024 }; /* zero bytes behind the scan: a block reads 65 times at most, up to 8 bytes on */

typedef struct {
    int across, down; /* blocks in an MCU */
    int id, table, last_dc;
    Codes *dc, *ac;
    uint8_t *plane;   /* rows of the row of MCUs that was decoded last, the last row of the one before in front */
    size_t pitch;
} Component;

struct Baseline {
    Codes dc[2], ac[2];
    int has_dc[2], has_ac[2], has_table[4];
    int16_t tables[4][64]; /* quantisation, by place in the block */
    Component components[3];
    int num_components, height, width;
    const uint8_t *scan, *end;
    /* the rows that are wanted */
    int top, bottom, left, right, pixel_bytes;
    int first_mcu, last_mcu, next_row; /* columns of MCUs kept; the row of them to be decoded next */
    int row, ready;                    /* next row of pixels; rows before this one are decoded */
    Bits bits;
    const uint8_t *begin, *finish;     /* the scan's bytes, without stuffing */
    uint8_t *memory, *lines[2];        /* a row of either chroma component, as wide as the brightness */
    size_t room;
};

/* ---- Header ---------------------------------------------------------------------------------------------------- */

static int read_codes(Baseline *b, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        int is_dc = !(*at >> 4), which = *at & 15, num_symbols = 0;
        if (*at >> 4 > 1 || which > 1 || end - at < 17) return 0;
        for (int i = 0; i < LONGEST; i++) num_symbols += at[1 + i];
        if (num_symbols > 256 || end - at < 17 + num_symbols) return 0;
        if (!make_codes((is_dc ? b->dc : b->ac) + which, at + 1, at + 17, num_symbols, is_dc)) return 0;
        (is_dc ? b->has_dc : b->has_ac)[which] = 1;
        at += 17 + num_symbols;
    }
    return 1;
}

static int read_tables(Baseline *b, const uint8_t *at, const uint8_t *end) {
    for (; at < end; at += 65) {
        if (*at > 3 || end - at < 65) return 0; /* 16 bits a value, or no such table */
        for (int i = 0; i < 64; i++) b->tables[*at][PLACES[1 + i]] = at[1 + i];
        b->has_table[*at] = 1;
    }
    return 1;
}

static int read_frame(Baseline *b, const uint8_t *at, size_t length) {
    int n = length >= 6 ? at[5] : 0;
    if (b->num_components || (n != 1 && n != 3) || length != 6 + 3 * (size_t)n || at[0] != 8) return 0;
    b->height = at[1] << 8 | at[2];
    b->width = at[3] << 8 | at[4];
    b->num_components = n;
    for (int i = 0; i < n; i++) {
        Component *c = &b->components[i];
        c->id = at[6 + 3 * i];
        c->across = at[7 + 3 * i] >> 4;
        c->down = at[7 + 3 * i] & 15;
        c->table = at[8 + 3 * i];
        if (c->table > 3 || c->across < 1 || c->across > 4 || c->down < 1 || c->down > 4) return 0;
    }
    Component *c = b->components;
    if (n == 1) c->across = c->down = 1; /* a single component is never interleaved, whatever it says */
    else if (c[1].across != 1 || c[1].down != 1 || c[2].across != 1 || c[2].down != 1) return 0;
    if (c->across > 2 || c->down > c->across) return 0;
    if (c->across == 2 && (b->width + 1) / 2 <= 2) return 0; /* too narrow to be smoothed */
    return b->height && b->width;
}

static int read_scan(Baseline *b, const uint8_t *at, size_t length) {
    int n = b->num_components;
    if (!n || length != 4 + 2 * (size_t)n || at[0] != n) return 0;
    for (int i = 0; i < n; i++) {
        Component *c = &b->components[i];
        int dc = at[2 + 2 * i] >> 4, ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != c->id || dc > 1 || ac > 1 || !b->has_dc[dc] || !b->has_ac[ac] || !b->has_table[c->table])
            return 0;
        c->dc = &b->dc[dc];
        c->ac = &b->ac[ac];
    }
    at += 1 + 2 * n;
    return at[0] == 0 && at[1] == 63 && at[2] == 0;
}

const uint8_t *baseline_open(Baseline *b, const uint8_t *jpeg, size_t size, int *height, int *width) {
    const uint8_t *at = jpeg + 2, *end = jpeg + size;
    int is_jfif = 0, transform = -1;
    b->num_components = 0;
    memset(b->has_dc, 0, sizeof(b->has_dc));
    memset(b->has_ac, 0, sizeof(b->has_ac));
    memset(b->has_table, 0, sizeof(b->has_table));
    for (size_t length; end - at >= 4 && at[0] == 0xFF; at += 2 + length) {
        int marker = at[1], fits = 1;
        const uint8_t *body = at + 4;
        length = at[2] << 8 | at[3];
        if (length < 2 || (size_t)(end - at) < 2 + length) return NULL;
        if (marker == 0xE0) is_jfif |= length >= 16 && !memcmp(body, "JFIF", 5);
        else if (marker == 0xEE && length >= 14 && !memcmp(body, "Adobe", 5)) transform = body[11];
        else if (marker == 0xC4) fits = read_codes(b, body, at + 2 + length);
        else if (marker == 0xDB) fits = read_tables(b, body, at + 2 + length);
        else if (marker == 0xC0) fits = read_frame(b, body, length - 2);
        else if (marker == 0xDA) {
            if (!read_scan(b, body, length - 2)) return NULL;
            break;
        } else if ((marker & 0xF0) != 0xE0 && marker != 0xFE) return NULL;
        if (!fits) return NULL;
    }
    if (end - at < 4 || at[0] != 0xFF || at[1] != 0xDA) return NULL;
    Component *c = b->components;
    int is_usual = c[0].id == 1 && c[1].id == 2 && c[2].id == 3;
    if (b->num_components == 3 && !is_jfif && transform != 1 && !(transform < 0 && is_usual)) return NULL; /* maybe RGB */
    b->scan = at + 2 + (at[2] << 8 | at[3]);
    b->end = end;
    *height = b->height;
    *width = b->width;
    return b->scan;
}

/* ---- Rows of MCUs ---------------------------------------------------------------------------------------------- */

static int num_mcus(const Baseline *b) { /* in a row of them */
    int pixels = 8 * b->components->across;
    return (b->width + pixels - 1) / pixels;
}

/* The first row of pixels of the MCUs that were decoded last. */
static int started(const Baseline *b) { return (b->next_row - 1) * 8 * b->components->down; }

/* The next row of MCUs: those of the columns kept into the planes, the others passed over. 0 where something is wrong. */
static int read_mcus(Baseline *b, int is_kept) {
    int until = is_kept && b->ready >= b->bottom ? b->last_mcu : num_mcus(b); /* nothing behind the last pixel is looked at */
    int16_t block[64 + 1]; /* and where zeros that belong nowhere go */
    for (int m = 0; m < until; m++) {
        int is_here = is_kept && m >= b->first_mcu && m < b->last_mcu;
        for (int i = 0; i < b->num_components; i++) {
            Component *c = &b->components[i];
            const int16_t *table = b->tables[c->table];
            for (int k = 0; k < c->across * c->down; k++) {
                int found = is_here ? read_block(&b->bits, c->dc, c->ac, &c->last_dc, block, 1)
                                    : read_block(&b->bits, c->dc, c->ac, &c->last_dc, block, 0);
                if (found == WRONG || 8 * (b->bits.at - b->begin) - b->bits.count > 8 * (b->finish - b->begin)) return 0;
                if (!is_here) continue;
                int y = k >= c->across, x = (m - b->first_mcu) * c->across + (y ? k - c->across : k); /* two rows at most */
                uint8_t *to = c->plane + (1 + 8 * y) * c->pitch + 8 * x;
                if (found == DC_ONLY && !write_flat_block(block, table, to, c->pitch)) return 0;
                if (found != DC_ONLY && !write_block(block, table, to, c->pitch)) return 0;
            }
        }
    }
    return 1;
}

/* Smoothing looks at a sample more on either side: at the picture's edges the outermost ones once more. */
static void repeat_edges(const Baseline *b, const Component *c) {
    int last = (b->width + 1) / 2 - 1 - 8 * b->first_mcu, columns = 8 * (b->last_mcu - b->first_mcu);
    for (uint8_t *row = c->plane + c->pitch; row <= c->plane + 8 * c->pitch; row += c->pitch) {
        if (b->first_mcu == 0) row[-1] = row[0];
        if (last < columns) row[last + 1] = row[last];
    }
}

/* The row y of one chroma component as wide as the brightness, in the line; answers the sample of pixel `left`. */
static const uint8_t *chroma_row(const Baseline *b, const Component *c, int y, uint8_t *line) {
    const Component *brightness = b->components;
    const uint8_t *plane = c->plane - 8 * b->first_mcu; /* as if it began with the picture's first sample */
    if (brightness->across == 1) return plane + (1 + y - started(b)) * c->pitch + b->left;
    int begin = b->left / 2, samples = (b->right + 1) / 2 - begin;
    if (brightness->down == 1) {
        const uint8_t *row = plane + (1 + y - started(b)) * c->pitch + begin;
        widen(row, row, samples, 4, 8, line);
    } else {
        int own = y / 2, other = y % 2 ? own + 1 : own - 1, height = (b->height + 1) / 2;
        if (other < 0 || other >= height) other = own;
        const uint8_t *near = plane + (1 + own - started(b) / 2) * c->pitch + begin;
        widen(near, near + (other - own) * (ptrdiff_t)c->pitch, samples, 8, 7, line);
    }
    return line + b->left % 2;
}

static void write_row(const Baseline *b, int y, uint8_t *to) {
    const Component *c = b->components;
    const uint8_t *light = c->plane + (1 + y - started(b)) * c->pitch + b->left - 8 * c->across * b->first_mcu;
    const uint8_t *cb = b->lines[0], *cr = cb; /* of a grey picture: 128 throughout */
    if (b->num_components == 3) {
        cb = chroma_row(b, c + 1, y, b->lines[0]);
        cr = chroma_row(b, c + 2, y, b->lines[1]);
    }
    write_colours(light, cb, cr, b->right - b->left, b->pixel_bytes, to);
}

/* ---- The wanted rows ------------------------------------------------------------------------------------------- */

/* The scan's bytes up to its first marker, without the zeros stuffed behind 0xFF. NULL where that does not end the picture. */
static uint8_t *unstuff(const uint8_t *at, const uint8_t *end, uint8_t *to) {
    while (at < end) {
        const uint8_t *mark = memchr(at, 0xFF, end - at);
        size_t plain = (mark ? mark : end) - at;
        memcpy(to, at, plain);
        to += plain;
        while (mark && mark + 1 < end && mark[1] == 0xFF) mark++;
        if (!mark || mark + 1 >= end) break;
        if (mark[1]) return mark[1] == 0xD9 ? to : NULL;
        *to++ = 0xFF;
        at = mark + 2;
    }
    return NULL;
}

int baseline_start(Baseline *b, int top, int bottom, int left, int right, int pixel_bytes) {
    Component *c = b->components;
    int across = c->across, mcus = num_mcus(b);
    b->top = b->row = b->ready = top;
    b->bottom = bottom;
    b->left = left;
    b->right = right;
    b->pixel_bytes = pixel_bytes;
    /* smoothing looks at a sample more on either side */
    b->first_mcu = (across == 1 ? left : left > 2 ? left - 2 : 0) / (8 * across);
    b->last_mcu = (right - 1 + (across == 1 ? 0 : 2)) / (8 * across) + 1;
    if (b->last_mcu > mcus) b->last_mcu = mcus;
    b->next_row = 0;
    size_t columns = 8 * (size_t)(b->last_mcu - b->first_mcu), scan = b->end - b->scan + SPARE, sizes[3], total = scan + 32;
    for (int i = 0; i < b->num_components; i++) {
        c[i].pitch = columns * c[i].across + 32;
        total += sizes[i] = (8 * (size_t)c[i].down + 1) * c[i].pitch;
        c[i].last_dc = 0;
        pair(c[i].ac, b->end - b->scan);
    }
    size_t line = right - left + 64;
    total += 2 * line;
    if (b->room < total) {
        free(b->memory);
        b->room = 0;
        if (!(b->memory = malloc(total))) return 0;
        b->room = total;
    }
    b->lines[0] = b->memory;
    b->lines[1] = b->lines[0] + line;
    if (b->num_components == 1) memset(b->lines[0], 128, line);
    uint8_t *at = b->lines[1] + line + 32; /* a sample is written in front of each row, and up to 31 behind */
    for (int i = 0; i < b->num_components; at += sizes[i++]) c[i].plane = at;
    b->begin = at;
    if (!(b->finish = unstuff(b->scan, b->end, at))) return 0;
    memset((uint8_t *)b->finish, 0, SPARE);
    b->bits = (Bits){0, 0, b->begin};
    return 1;
}

/* Decode rows of MCUs until rows of pixels are ready. */
static int advance(Baseline *b) {
    Component *c = b->components;
    int rows = 8 * c->down, smooths = c->down == 2, first = b->top - smooths > 0 ? (b->top - smooths) / rows : 0;
    while (b->ready <= b->row) {
        int m = b->next_row++, is_last = (m + 1) * rows >= b->height, is_kept = m >= first;
        if (m * rows >= b->height) return 0;
        if (is_kept) { /* the last row needs the first chroma row of the MCUs below */
            for (int i = 0; i < b->num_components && m > first; i++)
                memcpy(c[i].plane - 1, c[i].plane - 1 + 8 * c[i].down * c[i].pitch, c[i].pitch);
            int ready = is_last ? b->height : (m + 1) * rows - smooths;
            b->ready = ready > b->row ? ready : b->row;
        }
        if (!read_mcus(b, is_kept)) return 0;
        for (int i = 1; i < b->num_components && is_kept && c->across == 2; i++) repeat_edges(b, c + i);
    }
    return 1;
}

int baseline_read(Baseline *b, unsigned char **rows, int wanted) {
    if (b->ready <= b->row && !advance(b)) return 0;
    int until = b->ready < b->bottom ? b->ready : b->bottom, count = until - b->row < wanted ? until - b->row : wanted;
    for (int i = 0; i < count; i++) write_row(b, b->row++, rows[i]);
    return count;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

int baseline_works(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }

Baseline *baseline_new(void) { return baseline_works() ? calloc(1, sizeof(Baseline)) : NULL; }

void baseline_free(Baseline *b) {
    if (b) free(b->memory);
    free(b);
}

#else
int baseline_works(void) { return 0; }
Baseline *baseline_new(void) { return NULL; }
void baseline_free(Baseline *b) { (void)b; }
const uint8_t *baseline_open(Baseline *b, const uint8_t *jpeg, size_t size, int *height, int *width) { return NULL; }
int baseline_start(Baseline *b, int top, int bottom, int left, int right, int pixel_bytes) { return 0; }
int baseline_read(Baseline *b, unsigned char **rows, int wanted) { return 0; }
#endif
