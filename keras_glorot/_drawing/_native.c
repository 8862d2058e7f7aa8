/* The random stream of stream.py, which has the contract, by the compiler's vectors.

   Every loop that counts is plain C over a batch in the first-level cache, compiled once
   for each instruction set. Nothing here may contract a product and a sum into one
   operation: build with -ffp-contract=off. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#else
#define INLINE static inline
#define ALIGNED
#endif

enum { BATCH = 128 };          /* Philox blocks worked on at a time */
enum { WORDS = 4 * BATCH };    /* 32-bit words of so many blocks */
enum { MOST_AXES = 64 };       /* as in NumPy */
enum { KNOTS = (1 << 12) + 1, SHIFT = 19, POSITION = (1 << SHIFT) - 1 };

/* Philox4x32: the multipliers, and the numbers added to the key in each round. */
#define M0 0xD2511F53u
#define M1 0xCD9E8D57u
#define W0 0x9E3779B9u
#define W1 0xBB67AE85u
#define LOWER 0xFFFFFFFFu

typedef enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 } Dtype;
typedef enum { UNIFORM, TRUNCATED_NORMAL } Form;

INLINE size_t item_of(Dtype dtype) {
    return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2;
}

/* A region of a tensor: runs of neighbouring elements, all of one length, whose starts are
   given by extents and strides, innermost first. */
typedef struct {
    char *out; /* of the whole region */
    Dtype dtype;
    Form form;
    uint32_t key[2];
    double scale;
    const int32_t *knots;
    const double *rational; /* 10 coefficients of the numerator, 9 of the denominator */
    uint64_t first, last, base, run;
    uint64_t steps[2 * MOST_AXES]; /* a copy: aligned, and nobody else writes to it */
    size_t rank;
} Job;

INLINE void philox_rounds(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)M0 * c[0], p1 = (uint64_t)M1 * c[2];
        c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)p1;
        c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)p0;
        k0 += W0;
        k1 += W1;
    }
}

/* Plain C: four words for each block number. */
INLINE void make_words(uint32_t *restrict words, const uint64_t *restrict blocks,
                       size_t count, const uint32_t key[2]) {
    for (size_t i = 0; i < count; i++) {
        uint32_t c[4] = {(uint32_t)blocks[i], (uint32_t)(blocks[i] >> 32), key[0], key[1]};
        philox_rounds(c, key[0], key[1]);
        for (int j = 0; j < 4; j++) words[4 * i + j] = c[j];
    }
}

/* Plain C: words to odd integers by the integer quantile, in place. */
INLINE void make_quantiles(uint32_t *words, size_t count, const int32_t *knots) {
    for (size_t i = 0; i < count; i++) {
        uint32_t sign = 0u - (words[i] >> 31);
        uint32_t magnitude = words[i] ^ sign;
        uint32_t position = magnitude & POSITION;
        uint32_t low = (uint32_t)knots[magnitude >> SHIFT];
        uint32_t rise = (uint32_t)knots[(magnitude >> SHIFT) + 1] - low;
        uint32_t value = low + (uint32_t)(((uint64_t)rise * position) >> SHIFT);
        words[i] = ((value << 1) ^ sign) | 1;
    }
}

/* The same two for x86-64, whose compilers find neither the multiplication of the lower
   halves of 64-bit lanes nor one load for two neighbouring knots. In such lanes nothing
   has to be masked: the upper half is never looked at. */
#define VECTORS(SET, TARGET, BYTES, MULTIPLY)                                              \
    typedef uint64_t Wide##SET __attribute__((vector_size(BYTES)));                        \
    typedef uint32_t Narrow##SET __attribute__((vector_size(BYTES)));                      \
    enum { LANES##SET = BYTES / 8 };                                                       \
                                                                                           \
    TARGET static void make_words##SET(uint32_t *words, const uint64_t *blocks,            \
                                       size_t count, const uint32_t key[2]) {              \
        const Wide##SET zero = {0};                                                        \
        const Wide##SET m0 = zero + M0, m1 = zero + M1;                                    \
        ALIGNED uint64_t halves[2][BATCH];                                                 \
        for (size_t i = 0; i < count; i += LANES##SET) {                                   \
            Wide##SET x0 = *(const Wide##SET *)(blocks + i), x1 = x0 >> 32;                \
            Wide##SET x2 = zero + key[0], x3 = zero + key[1];                              \
            Wide##SET k0 = x2, k1 = x3;                                                    \
            for (int round = 0; round < 10; round++) {                                     \
                Wide##SET p0 = MULTIPLY(x0, m0), p1 = MULTIPLY(x2, m1);                    \
                x0 = (p1 >> 32) ^ x1 ^ k0;                                                 \
                x1 = p1;                                                                   \
                x2 = (p0 >> 32) ^ x3 ^ k1;                                                 \
                x3 = p0;                                                                   \
                k0 += W0;                                                                  \
                k1 += W1;                                                                  \
            }                                                                              \
            *(Wide##SET *)(halves[0] + i) = (x0 & LOWER) | x1 << 32;                       \
            *(Wide##SET *)(halves[1] + i) = (x2 & LOWER) | x3 << 32;                       \
        }                                                                                  \
        uint64_t *pairs = (uint64_t *)words;                                               \
        for (size_t i = 0; i < count; i++) {                                               \
            pairs[2 * i] = halves[0][i];                                                   \
            pairs[2 * i + 1] = halves[1][i];                                               \
        }                                                                                  \
    }                                                                                      \
                                                                                           \
    TARGET static void make_quantiles##SET(uint32_t *words, size_t count,                  \
                                           const int32_t *knots) {                         \
        ALIGNED uint32_t segments[WORDS];                                                  \
        ALIGNED uint64_t evens[WORDS / 2], odds[WORDS / 2]; /* two neighbouring knots each */\
        for (size_t i = 0; i < count; i += 2 * LANES##SET) {                               \
            Narrow##SET word = *(Narrow##SET *)(words + i);                                \
            *(Narrow##SET *)(segments + i) = (word ^ -(word >> 31)) >> SHIFT;              \
        }                                                                                  \
        for (size_t i = 0; i < count / 2; i++) {                                           \
            memcpy(evens + i, knots + segments[2 * i], 8);                                 \
            memcpy(odds + i, knots + segments[2 * i + 1], 8);                              \
        }                                                                                  \
        for (size_t i = 0; i < count; i += 2 * LANES##SET) {                               \
            Narrow##SET word = *(Narrow##SET *)(words + i), sign = -(word >> 31);          \
            Wide##SET position = (Wide##SET)((word ^ sign) & POSITION);                    \
            Wide##SET even = *(Wide##SET *)(evens + i / 2);                                \
            Wide##SET odd = *(Wide##SET *)(odds + i / 2);                                  \
            even += MULTIPLY((even >> 32) - even, position) >> SHIFT;                      \
            odd += MULTIPLY((odd >> 32) - odd, position >> 32) >> SHIFT;                   \
            Narrow##SET value = (Narrow##SET)((even & LOWER) | odd << 32);                 \
            *(Narrow##SET *)(words + i) = (value << 1 ^ sign) | 1;                         \
        }                                                                                  \
    }

#ifdef X86
#define V2 /* on every x86-64 */
#define V3 __attribute__((target("avx,avx2,bmi,bmi2,f16c,fma,lzcnt,movbe")))
#ifdef __clang__ /* does not know the last option, and would ignore all of them */
#define WIDTH_OF_V4 ""
#else
#define WIDTH_OF_V4 ",prefer-vector-width=512"
#endif
#define V4                                                                                 \
    __attribute__((target("avx,avx2,bmi,bmi2,f16c,fma,lzcnt,movbe,avx512f,avx512bw,"       \
                          "avx512cd,avx512dq,avx512vl" WIDTH_OF_V4)))

#define MULTIPLY_V2(a, b) (Wide_v2) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#define MULTIPLY_V3(a, b) (Wide_v3) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define MULTIPLY_V4(a, b) (Wide_v4) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
VECTORS(_v2, V2, 16, MULTIPLY_V2)
VECTORS(_v3, V3, 32, MULTIPLY_V3)
VECTORS(_v4, V4, 64, MULTIPLY_V4)
#endif

INLINE void make_floats(float *restrict out, const uint32_t *restrict words, size_t count,
                        float scale) {
    for (size_t i = 0; i < count; i++)
        out[i] = ((float)(int32_t)(words[i] | 1) * 0x1p-31f) * scale;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* To nearest, ties to even, as NumPy and ml_dtypes do. No value is NaN. */
INLINE void round_bfloat16(uint16_t *restrict out, const float *restrict in, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = bits_of(in[i]);
        out[i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}

INLINE void round_float16(uint16_t *restrict out, const float *restrict in, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = bits_of(in[i]);
        uint32_t sign = bits >> 16 & 0x8000;
        uint32_t size = bits & 0x7FFFFFFF;
        float magnitude;
        memcpy(&magnitude, &size, sizeof magnitude);
        /* The sum's last place is that of the smallest float16: addition rounds. */
        uint32_t subnormal = bits_of(magnitude + 0.5f) - 0x3F000000;
        uint32_t normal = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
        uint32_t half = size < (113u << 23) ? subnormal : normal;
        out[i] = (uint16_t)(sign | (half < 0x7C00 ? half : 0x7C00));
    }
}

INLINE void make_doubles(double *restrict out, const uint32_t *restrict words, size_t count,
                         Form form, double scale, const double *c) {
    for (size_t i = 0; i < count; i++) {
        uint64_t word = words[2 * i] | (uint64_t)words[2 * i + 1] << 32;
        double x = (double)(((int64_t)word >> 10) | 1) * 0x1p-53;
        if (form == TRUNCATED_NORMAL) {
            double s = 1 - x * x, numerator = c[0] * s, denominator = s + c[10];
            for (int j = 1; j < 9; j++) numerator = (numerator + c[j]) * s;
            for (int j = 11; j < 19; j++) denominator = denominator * s + c[j];
            x = x * (numerator + c[9]) / denominator;
        }
        out[i] = x * scale;
    }
}

/* Where a run starts in the tensor. */
INLINE uint64_t start_of(const Job *job, uint64_t run) {
    uint64_t start = job->base;
    for (size_t i = 0; i < job->rank; i++) {
        uint64_t extent = job->steps[2 * i], stride = job->steps[2 * i + 1];
        start += run % extent * stride;
        run /= extent;
    }
    return start;
}

typedef void MakeWords(uint32_t *, const uint64_t *, size_t, const uint32_t[2]);
typedef void MakeQuantiles(uint32_t *, size_t, const int32_t *);

INLINE void fill_job(const Job *job, MakeWords *make_words, MakeQuantiles *make_quantiles) {
    ALIGNED uint64_t numbers[BATCH] = {0};
    ALIGNED uint32_t words[WORDS];
    ALIGNED float floats[WORDS];
    ALIGNED union { uint16_t halves[WORDS]; double doubles[WORDS / 2]; } values;
    uint16_t offsets[BATCH], lengths[BATCH]; /* of the region's part of a batch */
    const size_t per_block = job->dtype == FLOAT64 ? 2 : 4;
    const size_t item = item_of(job->dtype);
    const void *source = job->dtype == FLOAT32 ? (void *)floats : (void *)&values;
    char *out = job->out + job->first * item;
    uint64_t run = job->first / job->run, inside = job->first % job->run;
    uint64_t left = job->last - job->first, start = start_of(job, run);

    while (left) {
        size_t blocks = 0, segments = 0;
        while (left && blocks < BATCH) {
            uint64_t index = start + inside, count = job->run - inside;
            if (count > left) count = left;
            uint64_t block = index / per_block, skipped = index % per_block;
            uint64_t room = (BATCH - blocks) * per_block - skipped;
            if (count > room) count = room;
            size_t needed = (size_t)((skipped + count + per_block - 1) / per_block);
            offsets[segments] = (uint16_t)(blocks * per_block + skipped);
            lengths[segments++] = (uint16_t)count;
            for (size_t i = 0; i < needed; i++) numbers[blocks + i] = block + i;
            blocks += needed;
            left -= count;
            inside += count;
            if (inside == job->run && left) {
                inside = 0;
                start = start_of(job, ++run);
            }
        }
        size_t whole = (blocks + 15) / 16 * 16; /* full vectors; the rest is not used */
        make_words(words, numbers, whole, job->key);
        if (job->dtype == FLOAT64) {
            make_doubles(values.doubles, words, 2 * whole, job->form, job->scale,
                         job->rational);
        } else {
            if (job->form == TRUNCATED_NORMAL) make_quantiles(words, 4 * whole, job->knots);
            make_floats(floats, words, 4 * whole, (float)job->scale);
            if (job->dtype == FLOAT16) round_float16(values.halves, floats, 4 * whole);
            if (job->dtype == BFLOAT16) round_bfloat16(values.halves, floats, 4 * whole);
        }
        for (size_t i = 0; i < segments; i++) {
            memcpy(out, (const char *)source + offsets[i] * item, lengths[i] * item);
            out += lengths[i] * item;
        }
    }
}

#include "_orthogonal.h"

/* One copy for each instruction set, the best last. */
#ifdef X86
V2 static void fill_v2(const Job *job) { fill_job(job, make_words_v2, make_quantiles_v2); }
V3 static void fill_v3(const Job *job) { fill_job(job, make_words_v3, make_quantiles_v3); }
V4 static void fill_v4(const Job *job) { fill_job(job, make_words_v4, make_quantiles_v4); }
#endif
static void fill_plain(const Job *job) { fill_job(job, make_words, make_quantiles); }

typedef struct {
    const char *name;
    void (*fill)(const Job *);
    void (*multiply)(const Product *, const Place *, Phase, size_t, size_t, char *);
} Clone;

static Clone clones[4];
static int clone_count;

static void find_clones(void) {
    clone_count = 0;
    clones[clone_count++] = (Clone){"plain C", fill_plain, multiply_job_plain};
#ifdef X86
    clones[clone_count++] = (Clone){"x86-64", fill_v2, multiply_job_v2};
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")
        && __builtin_cpu_supports("fma")) {
        clones[clone_count++] = (Clone){"x86-64-v3", fill_v3, multiply_job_v3};
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl"))
            clones[clone_count++] = (Clone){"x86-64-v4", fill_v4, multiply_job_v4};
    }
#endif
}

static PyObject *philox(PyObject *self, PyObject *args) {
    unsigned int c[4], k[2];
    if (!PyArg_ParseTuple(args, "(IIII)(II)", c, c + 1, c + 2, c + 3, k, k + 1)) return NULL;
    uint32_t counter[4] = {c[0], c[1], c[2], c[3]};
    philox_rounds(counter, k[0], k[1]);
    return Py_BuildValue("IIII", counter[0], counter[1], counter[2], counter[3]);
}

/* Copies the steps, and returns whether they are some that can be counted with. */
static int read_steps(Job *job, const Py_buffer *steps) {
    if (steps->len % 16 || (size_t)steps->len > sizeof job->steps) return 0;
    job->rank = (size_t)steps->len / 16;
    memcpy(job->steps, steps->buf, (size_t)steps->len);
    for (size_t i = 0; i < job->rank; i++)
        if (!job->steps[2 * i]) return 0;
    return 1;
}

static PyObject *fill(PyObject *self, PyObject *args) {
    Py_buffer out, knots, rational, steps;
    int dtype, form, clone;
    unsigned int k0, k1;
    unsigned long long first, last, base, run;
    double scale;
    if (!PyArg_ParseTuple(args, "iw*ii(II)dy*y*KKKKy*", &clone, &out, &dtype, &form, &k0,
                          &k1, &scale, &knots, &rational, &first, &last, &base, &run,
                          &steps))
        return NULL;
    Job job = {
        .out = out.buf,
        .dtype = (Dtype)dtype,
        .form = (Form)form,
        .key = {k0, k1},
        .scale = scale,
        .knots = knots.buf,
        .rational = rational.buf,
        .first = first,
        .last = last,
        .base = base,
        .run = run,
    };
    if (clone < 0) clone += clone_count; /* -1: the best */
    const int right = clone >= 0 && clone < clone_count && dtype >= FLOAT16
                      && dtype <= FLOAT64 && (form == UNIFORM || form == TRUNCATED_NORMAL)
                      && first <= last && run
                      && (unsigned long long)out.len / item_of((Dtype)dtype) >= last
                      && knots.len == KNOTS * (Py_ssize_t)sizeof(int32_t)
                      && rational.len == 19 * (Py_ssize_t)sizeof(double)
                      && read_steps(&job, &steps);
    if (!right) {
        PyErr_SetString(PyExc_ValueError, "arguments that stream.py would not give");
    } else if (last - first <= 4096) { /* the lock's hand-over would take longer */
        clones[clone].fill(&job);
    } else {
        Py_BEGIN_ALLOW_THREADS
        clones[clone].fill(&job);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&knots);
    PyBuffer_Release(&rational);
    PyBuffer_Release(&steps);
    if (!right) return NULL;
    Py_RETURN_NONE;
}

static PyObject *multiply(PyObject *self, PyObject *args) {
    Py_buffer out, vectors, sums;
    int dtype, clone, transposed, phase;
    unsigned int k0, k1;
    unsigned long long first_block, rows, columns, area[4], first, last;
    double scale;
    if (!PyArg_ParseTuple(args, "iw*ii(II)dKKKp(KKKK)w*w*KK", &clone, &out, &dtype, &phase,
                          &k0, &k1, &scale, &first_block, &rows, &columns, &transposed,
                          area, area + 1, area + 2, area + 3, &vectors, &sums, &first,
                          &last))
        return NULL;
    const Product p = {{k0, k1}, first_block, rows, columns, vectors.buf, sums.buf};
    const Place place = {out.buf, (Dtype)dtype, scale, transposed,
                         {area[0], area[1]}, {area[2], area[3]}};
    if (clone < 0) clone += clone_count; /* -1: the best */
    int right = clone >= 0 && clone < clone_count && dtype >= FLOAT16 && dtype <= FLOAT64
                && phase >= VECTORS_OF_BLOCKS && phase <= MATRICES && columns
                && columns <= rows && area[0] < area[1] && area[1] <= rows
                && area[2] < area[3] && area[3] <= columns && first <= last
                && are_large_enough(&p, &place, (Phase)phase, last, out.len, vectors.len,
                                    sums.len);
    char *work = right ? malloc(work_size(&p, (Phase)phase)) : NULL;
    const int done = work != NULL;
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        clones[clone].multiply(&p, &place, (Phase)phase, first, last, work);
        Py_END_ALLOW_THREADS
        free(work);
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&vectors);
    PyBuffer_Release(&sums);
    if (done) Py_RETURN_NONE;
    if (right) return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, "arguments that orthogonal.py would not give");
    return NULL;
}

static PyMethodDef methods[] = {
    {"multiply", multiply, METH_VARARGS, "multiply(clone, out, ...): see orthogonal.py"},
    {"fill", fill, METH_VARARGS, "fill(clone, out, dtype, form, key, ...): see stream.py"},
    {"philox", philox, METH_VARARGS, "philox(counter, key): one block of Philox4x32-10"},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    find_clones();
    PyObject *names = PyTuple_New(clone_count);
    if (!names) return -1;
    for (int i = 0; i < clone_count; i++)
        if (PyTuple_SetItem(names, i, PyUnicode_FromString(clones[i].name))) return -1;
    int failed = PyModule_AddObjectRef(module, "CLONES", names);
    Py_DECREF(names);
    return failed;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
