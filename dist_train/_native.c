/* Whole batches of bytes, without the GIL: JPEGs to the pixels of their crops (_jpeg.h), reading, checksums, sums, gathers.
 * And the words of the order (_hash.h).
 *
 * decode.py, pictures.py, cache.py and order.py are the doors to this file; each has a portable twin that gives the same bits.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

#include "_hash.h"
#include "_jpeg.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef HAVE_XXHASH
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif

enum { CORE_VERSION = 2 }; /* decode.py's: a core of another is not used. Raise both when a function or its pixels change */
enum { SHORT_READ = 2, READ_FAILED = 3, ERRNO_FROM = 64 }; /* after DONE and LEFT; from the last on, with the error's number */
enum { STORED_PAST_CACHE = 1 << 21 };                      /* bytes */

static PyObject *wrong_size(const char *what) {
    return PyErr_Format(PyExc_ValueError, "%s has the wrong number of bytes", what);
}

static int is_size(int height, int width) { return height > 0 && width > 0 && height < 65536 && width < 65536; }

PyDoc_STRVAR(decode_doc,
"decode(source, starts, sizes, boxes, out, height, width, status, is_cubic)\n\n"
"Decode payload i = source[starts[i] : starts[i] + sizes[i]] into out[i], for all i, without the GIL.\n"
"starts: (N,) uint64, sizes: (N,) uint32, boxes: (N, 4) float64 or None, out: (N, height, width, 3) uint8,\n"
"is_cubic: whether pixels are resized bicubically, else bilinearly.\n"
"status: (N,) uint8. Samples whose status is not 0 on entry are passed over; on return 0 says done, 1 left to others.\n"
"Returns how many were baseline JPEGs for which libjpeg-turbo was not needed.");

static PyObject *py_decode(PyObject *self, PyObject *args) {
    Py_buffer source, starts, sizes, boxes, out, status;
    int height, width, is_cubic, fits = 0;
    ptrdiff_t num_baseline = 0;
    if (!PyArg_ParseTuple(args, "y*y*y*z*w*iiw*p", &source, &starts, &sizes, &boxes, &out, &height, &width, &status,
                          &is_cubic))
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
        Resizer resizer = {.is_cubic = is_cubic};
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
"ends before, 64 + errno the system refused, 3 the same with a number past 191.");

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
                else if (errno != EINTR) state[i] = errno < 256 - ERRNO_FROM ? ERRNO_FROM + errno : READ_FAILED;
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
"resize(source, source_height, source_width, box, out, height, width, is_cubic)\n\n"
"Resize the box (top, left, height, width) of a (source_height, source_width, 3) uint8 picture into out.");

static PyObject *py_resize(PyObject *self, PyObject *args) {
    Py_buffer source, out;
    int from_height, from_width, height, width, is_cubic, fits = 0;
    double box[4];
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*ii(dddd)w*iip", &source, &from_height, &from_width, box, box + 1, box + 2, box + 3,
                          &out, &height, &width, &is_cubic))
        return NULL;
    if (from_height < 1 || from_width < 1 || source.len != (Py_ssize_t)3 * from_height * from_width)
        wrong_size("source");
    else if (!is_size(height, width) || out.len != (Py_ssize_t)3 * height * width) wrong_size("out");
    else if (!(box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 && box[0] + box[2] <= from_height &&
               box[1] + box[3] <= from_width))
        PyErr_SetString(PyExc_ValueError, "box lies outside the picture");
    else {
        Py_BEGIN_ALLOW_THREADS
        Resizer r = {.is_cubic = is_cubic};
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

static void add_sums(const uint8_t *pixels, size_t size, uint64_t totals[6]) {
    enum { LANES = 48, TURNS = 65536 }; /* so many squares fit 32 bits; a fixed number of lanes becomes vectors */
    for (size_t at = 0; at < size;) {
        uint32_t sums[LANES] = {0}, squares[LANES] = {0};
        for (int turn = 0; turn < TURNS && size - at >= LANES; turn++, at += LANES)
            for (int k = 0; k < LANES; k++) {
                uint16_t value = pixels[at + k];
                sums[k] += value;
                squares[k] += (uint16_t)(value * value);
            }
        if (size - at < LANES) {
            for (int c = 0; at < size; at++, c = (c + 1) % 3) {
                totals[c] += pixels[at];
                totals[3 + c] += pixels[at] * pixels[at];
            }
        }
        for (int k = 0; k < LANES; k++) {
            totals[k % 3] += sums[k];
            totals[3 + k % 3] += squares[k];
        }
    }
}

PyDoc_STRVAR(sum_pixels_doc,
"sum_pixels(pixels, totals)\n\n"
"Add the sums of each channel of (N, 3) uint8, then the sums of their squares, to totals, (6,) uint64, without the GIL.");

static PyObject *py_sum_pixels(PyObject *self, PyObject *args) {
    Py_buffer pixels, totals;
    PyObject *result = Py_None;
    if (!PyArg_ParseTuple(args, "y*w*", &pixels, &totals)) return NULL;
    if (pixels.len % 3 || totals.len != 6 * 8) result = wrong_size("pixels or totals");
    else {
        Py_BEGIN_ALLOW_THREADS
        add_sums(pixels.buf, pixels.len, totals.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&totals);
    return Py_XNewRef(result);
}

/* Rows lie anywhere, which no processor foresees: while one is copied, the next but one is fetched. What is larger than a
 * core's own cache is stored past it, or each line would be read before it is written: half as fast again. */
static void gather_rows(const char *source, size_t row, const int64_t *samples, char *out, ptrdiff_t n) {
#ifdef __SSE2__
    const int past_cache = row * n >= STORED_PAST_CACHE && row % 16 == 0 && (uintptr_t)out % 16 == 0;
#endif
    for (ptrdiff_t i = 0; i < n; i++) {
        const char *from = source + samples[i] * row, *next = i + 2 < n ? source + samples[i + 2] * row : from;
        char *to = out + i * row;
#ifdef __SSE2__
        if (past_cache) {
            for (size_t k = 0; k < row; k += 16) {
                if (k % 64 == 0) _mm_prefetch(next + k, _MM_HINT_T2);
                _mm_stream_si128((__m128i *)(to + k), _mm_loadu_si128((const __m128i *)(from + k)));
            }
            continue;
        }
#endif
#ifdef __GNUC__
        for (size_t k = 0; k < row; k += 64) __builtin_prefetch(next + k, 0, 1);
#endif
        memcpy(to, from, row);
    }
#ifdef __SSE2__
    _mm_sfence(); /* such stores are seen in any order */
#endif
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
        gather_rows(source.buf, row, sample, out.buf, n);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&samples);
    PyBuffer_Release(&out);
    return Py_XNewRef(result);
}

PyDoc_STRVAR(mix_doc,
"mix(words)\n\n"
"Put each of the words, (N,) uint64, through splitmix64's finaliser.");

static PyObject *py_mix(PyObject *self, PyObject *args) {
    Py_buffer words;
    if (!PyArg_ParseTuple(args, "w*", &words)) return NULL;
    uint64_t *word = words.buf;
    for (Py_ssize_t i = 0; i < words.len / 8; i++) word[i] = mix(word[i]);
    PyBuffer_Release(&words);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(permute_doc,
"permute(places, sizes, keys, rounds, out)\n\n"
"Where the permutation of 0..sizes[i]-1 that keys[i] names takes places[i], to out[i], for all i, without the GIL.\n"
"places, out: (N,) int64; sizes, keys: uint64, (N,), or (1,) for the same throughout.");

static PyObject *py_permute(PyObject *self, PyObject *args) {
    Py_buffer places, sizes, keys, out;
    int rounds;
    PyObject *result = Py_None;
    if (!PyArg_ParseTuple(args, "y*y*y*iw*", &places, &sizes, &keys, &rounds, &out)) return NULL;
    const uint64_t *place = places.buf, *size = sizes.buf, *key = keys.buf;
    Py_ssize_t n = places.len / 8;
    int size_step = sizes.len != 8, key_step = keys.len != 8;
    if (out.len != places.len) result = wrong_size("out");
    else if (size_step && sizes.len != places.len) result = wrong_size("sizes");
    else if (key_step && keys.len != places.len) result = wrong_size("keys");
    for (Py_ssize_t i = 0; result && i < n; i++) /* from elsewhere the walk need not come to an end */
        if (place[i] >= size[i * size_step]) {
            result = NULL;
            PyErr_SetString(PyExc_ValueError, "a place lies outside its permutation");
        }
    if (result) {
        Py_BEGIN_ALLOW_THREADS
        permute(place, size, size_step, key, key_step, rounds, out.buf, n);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&places);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&keys);
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
    {"sum_pixels", py_sum_pixels, METH_VARARGS, sum_pixels_doc},
    {"gather", py_gather, METH_VARARGS, gather_doc},
    {"mix", py_mix, METH_VARARGS, mix_doc},
    {"permute", py_permute, METH_VARARGS, permute_doc},
    {"fence", py_fence, METH_NOARGS, fence_doc},
    {NULL, NULL, 0, NULL},
};

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

/* XXH3 gave other values before version 0.8.0. Short and long input go different ways. */
static int has_xxh3(void) {
#ifdef HAVE_XXHASH
    static const char zeros[1024];
    return XXH3_64bits(zeros, 8) == 0xC77B3ABB6F87ACD9 && XXH3_64bits(zeros, sizeof(zeros)) == 0xDE5F15AB6DAF7941;
#else
    return 1;
#endif
}

/* LIBJPEG_TURBO: of the header; the library that is loaded may be newer. HAS_BASELINE: whether _baseline.c works here. */
static int fill(PyObject *module) {
    return PyModule_AddIntConstant(module, "CORE_VERSION", CORE_VERSION) ||
           PyModule_AddStringConstant(module, "LIBJPEG_TURBO", TEXT(LIBJPEG_TURBO_VERSION)) ||
           PyModule_AddIntConstant(module, "HAS_BASELINE", baseline_works()) ||
           (!has_xxh3() && PyObject_DelAttrString(module, "checksum"));
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
