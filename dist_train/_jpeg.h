/* One JPEG -> the pixels of its box: who decodes it, and which rows and columns of it. Included by _native.c.
 *
 * Whatever is not plain (another format, a rotated, damaged or suspicious JPEG) is left to decode.py's portable twin by
 * answering LEFT.
 */
#include <setjmp.h>
#include <stdio.h>

#include <jpeglib.h>
#include <jerror.h>

#include "_baseline.h"
#include "_resize.h"

#if LIBJPEG_TURBO_VERSION_NUMBER < 2000006
#error "libjpeg-turbo 2.0.6 or newer is needed"
#endif

enum { DONE = 0, LEFT = 1 };

/* The same figures stand in picture_header.py and decode.py, with their reasons. */
#define MAX_PIXELS 200000000.0
#define MAX_PIXELS_PER_BYTE 2048.0
#define MAX_SCANS 200
#define REDUCED_BEFORE_SCALING 4.0
#define SCALED_FROM 512

#define ROWS_AT_ONCE 8 /* rows asked of a decoder in one call; a few stay in the first cache */

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

/* Whether an APP1 segment is EXIF that asks for the picture to be turned or mirrored. */
static int turns(const unsigned char *segment, size_t length) {
    if (length < 8 + 12 || memcmp(segment + 4, "Exif\0", 6)) return 0;
    const unsigned char *tiff = segment + 10;
    size_t end = length - 8;
    int little = tiff[0] == 'I';
    size_t entry = number(tiff + 4, 4, little);
    unsigned entries = entry <= end - 2 ? number(tiff + entry, 2, little) : 0;
    for (entry += 2; entries-- && entry + 10 <= end; entry += 12)
        if (number(tiff + entry, 2, little) == 0x0112 && number(tiff + entry + 8, 2, little) != 1) return 1;
    return 0;
}

/* The frame header of an upright JPEG, baseline, extended or progressive. NULL for any other: picture_header.py reads alike. */
static const unsigned char *find_frame(const unsigned char *jpeg, size_t size) {
    size_t at = 2;
    while (at + 4 <= size && jpeg[at] == 0xFF) {
        unsigned marker = jpeg[at + 1];
        if (marker == 0xFF || marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {
            at += marker == 0xFF ? 1 : 2;
            continue;
        }
        size_t length = number(jpeg + at + 2, 2, 0);
        if (!marker || marker == 0xDA || marker == 0xD9 || length < 2 || at + 2 + length > size) return NULL;
        if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC)
            return marker <= 0xC2 || marker == 0xC9 || marker == 0xCA ? jpeg + at : NULL;
        if (marker == 0xE1 && turns(jpeg + at, length)) return NULL;
        at += 2 + length;
    }
    return NULL;
}

/* Whether the first marker in a scan's bytes is the picture's end, restarts aside. The portable path reads up to there, and
 * refuses most others; this one may stop long before, so it leaves all of them to that. */
static int ends_the_picture(const unsigned char *at, const unsigned char *end, int has_restarts) {
    while ((at = memchr(at, 0xFF, end - at))) {
        while (++at < end && *at == 0xFF);
        if (at == end || *at == 0xD9) return at < end;
        if (*at && !(has_restarts && (*at & 0xF8) == 0xD0)) return 0;
    }
    return 0;
}

static int count_scans(const unsigned char *at, const unsigned char *end) {
    int scans = 0;
    while ((at = memchr(at, 0xFF, end - at)) && ++at < end) scans += *at == 0xDA;
    return scans;
}

/* Whether a progressive JPEG came without some of its bits: libjpeg-turbo smooths such pictures, each version in its own way, and
 * other pixels at the edges of a cut. Looked at: the coefficients that it looks at. */
static int is_smoothed(const struct jpeg_decompress_struct *jpeg) {
    for (int i = 0; jpeg->progressive_mode && i < jpeg->num_components; i++)
        for (int k = 1; k <= 9; k++)
            if (jpeg->coef_bits[i][k]) return 1;
    return 0;
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
    /* before 3.0, the chroma of such a cut has parts that nobody wrote */
    int is_uncut = jpeg->scale_denom > 1 && (jpeg->max_h_samp_factor > 2 || jpeg->max_v_samp_factor > 2);
    if (is_uncut) begin = 0, columns = full_width;
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
    if (!jpeg_has_multiple_scans(&jpeg) && /* of several, all are read in any case */
        !ends_the_picture(jpeg.src->next_input_byte, payload + size, jpeg.restart_interval))
        goto end;
    int cmyk = jpeg.num_components == 4, copies = w.is_whole && !cmyk;
    jpeg.scale_num = 1;
    jpeg.scale_denom = w.scale;
    jpeg.out_color_space = cmyk ? JCS_CMYK : copies ? JCS_EXT_RGB : JCS_EXT_RGBX;
    jpeg_start_decompress(&jpeg);
    int tall = (jpeg.image_height + w.scale - 1) / w.scale, wide = (jpeg.image_width + w.scale - 1) / w.scale;
    if ((int)jpeg.output_height != tall || (int)jpeg.output_width != wide || is_smoothed(&jpeg)) goto end;
    answer = copies ? copy_rows(&jpeg, out) : decode_rows(&jpeg, r, w.box, out, height, width);
    if (answer == DONE && jpeg.output_scanline == jpeg.output_height) jpeg_finish_decompress(&jpeg); /* damage at the end */
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
    if (!scan || !want(&w, tall, wide, size, box, height, width, 0) || w.scale > 1) return LEFT;
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
                       unsigned char *out, int height, int width, ptrdiff_t *num_baseline) {
    if (size < 4 || payload[0] != 0xFF || payload[1] != 0xD8) return LEFT;
    const unsigned char *frame = find_frame(payload, size);
    if (!frame || count_scans(frame, payload + size) > MAX_SCANS) return LEFT;
    if (b && decode_baseline(b, payload, size, box, r, out, height, width) == DONE) {
        ++*num_baseline;
        return DONE;
    }
    return decode_any(payload, size, box, r, out, height, width);
}
