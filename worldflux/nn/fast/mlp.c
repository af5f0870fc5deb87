/* Whole multilayer perceptrons of TD-MPC2, forward and backward; worldflux/nn/mish.py is the definition.
 *
 * A layer is linear, or linear followed by LayerNorm and Mish or SimNorm. Matrix products use the sgemm of torch's own
 * BLAS, which is passed in; everything between two products is one pass over rows that are still in the cache.
 *
 * Arrays are row-major float32. N is the number of rows and M the number of ensemble members, whose parameters follow
 * one another in memory. `saved` holds what the backward pass needs, for each member and each layer with a norm: the
 * input of the norm [N, out], its means [N], its inverse standard deviations [N], and the output of the layer [N, out].
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

typedef void (*sgemm_t)(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const float *,
                        const float *, const int64_t *, const float *, const int64_t *, const float *, float *,
                        const int64_t *);

enum { PLAIN = 0, MISH = 1, SIMNORM = 2 };

typedef struct {
    const float *weight, *bias, *scale, *shift; /* [M, out, in], others [M, out]; scale and shift may be NULL */
    int64_t in, out, kind, group;               /* group: size of SimNorm's groups */
} Layer;

typedef struct {
    const float *data;
    int64_t width, stride, repeat; /* row r of the input is row r / repeat of the part; stride: distance between rows */
} Part;

static const float EPS = 1e-5f;
static const int64_t PARALLEL = 65536; /* number of elements from which starting several threads pays off */

/* exp, accurate to two units in the last place; results are clamped to [1e-38, 1e38]. */
static inline float exponential(float x) {
    union {
        int32_t i;
        float f;
    } power;
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    power.i = ((int32_t)n + 127) << 23;
    return p * power.f;
}

/* With e = exp(x) and w = e (e + 2), tanh(log(1 + e)) = w / (w + 2), which is 1 for x above 20. */
static inline float mish(float x) {
    float e = exponential(x > 20.0f ? 20.0f : x), w = e * (e + 2.0f);
    return x * (w / (w + 2.0f));
}

static inline float mish_slope(float x) {
    float e = exponential(x > 20.0f ? 20.0f : x), w = e * (e + 2.0f), r = 1.0f / (w + 2.0f);
    return w * r + 4.0f * x * e * (e + 1.0f) * r * r;
}

static void softmax_groups(float *x, int64_t width, int64_t group) {
    if (group == 8) {
        for (int64_t i = 0; i < width; i += 8) {
            float *v = x + i;
            float a = v[0] > v[4] ? v[0] : v[4], b = v[1] > v[5] ? v[1] : v[5];
            float c = v[2] > v[6] ? v[2] : v[6], d = v[3] > v[7] ? v[3] : v[7];
            a = a > b ? a : b;
            c = c > d ? c : d;
            a = a > c ? a : c;
            for (int j = 0; j < 8; j++) v[j] -= a;
        }
    } else {
        for (int64_t i = 0; i < width; i += group) {
            float most = x[i];
            for (int64_t j = 1; j < group; j++) most = x[i + j] > most ? x[i + j] : most;
            for (int64_t j = 0; j < group; j++) x[i + j] -= most;
        }
    }
#pragma omp simd
    for (int64_t j = 0; j < width; j++) x[j] = exponential(x[j]);
    if (group == 8) {
        for (int64_t i = 0; i < width; i += 8) {
            float *v = x + i;
            float r = 1.0f / (((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])));
            for (int j = 0; j < 8; j++) v[j] *= r;
        }
    } else {
        for (int64_t i = 0; i < width; i += group) {
            float sum = 0.0f;
            for (int64_t j = 0; j < group; j++) sum += x[i + j];
            for (int64_t j = 0; j < group; j++) x[i + j] /= sum;
        }
    }
}

/* y = (y + bias) * dropout, then LayerNorm and the activation into `out`, which may be y itself. */
static void finish(const Layer *l, const float *bias, const float *scale, const float *shift, const float *dropout,
                   int64_t rows, float *y, float *mean, float *rstd, float *out, int threads) {
    const int64_t width = l->out;
    const float share = 1.0f / (float)width;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= PARALLEL && threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *row = y + r * width, *to = out + r * width, sum = 0.0f, square = 0.0f;
        if (dropout) {
            const float *factor = dropout + r * width;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; j++) {
                row[j] = (row[j] + bias[j]) * factor[j];
                sum += row[j];
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; j++) {
                row[j] += bias[j];
                sum += row[j];
            }
        }
        const float m = sum * share;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < width; j++) square += (row[j] - m) * (row[j] - m);
        const float d = 1.0f / sqrtf(square * share + EPS);
        if (mean) {
            mean[r] = m;
            rstd[r] = d;
        }
        if (l->kind == MISH) {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = mish((row[j] - m) * d * scale[j] + shift[j]);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = (row[j] - m) * d * scale[j] + shift[j];
            softmax_groups(to, width, l->group);
        }
    }
}

/* Gradient of `finish`: turns `grad` [N, out] into the gradient of the product, and adds to the gradients of the
 * parameters. */
static void unfinish(const Layer *l, const float *scale, const float *shift, const float *dropout, int64_t rows,
                     const float *y, const float *mean, const float *rstd, const float *out, float *grad, float *d_bias,
                     float *d_scale, float *d_shift, int threads) {
    const int64_t width = l->out;
    const float share = 1.0f / (float)width;
    const int parameters = d_bias != NULL;
    /* Each thread sums its own rows, and the sums are added in the order of the threads, so that runs are repeatable. */
    float *all = calloc((size_t)(4 * width * threads), sizeof(float));
    int teams = 1;
#pragma omp parallel num_threads(threads) if (rows * width >= PARALLEL && threads > 1)
    {
        float *sums = all + 4 * width * omp_get_thread_num(), *hat = sums + 3 * width;
#pragma omp single
        teams = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const float *row = y + r * width, *result = out + r * width, m = mean[r], d = rstd[r];
            float *g = grad + r * width, sum = 0.0f, dot = 0.0f;
            if (l->kind == MISH) {
#pragma omp simd
                for (int64_t j = 0; j < width; j++) {
                    hat[j] = (row[j] - m) * d;
                    g[j] *= mish_slope(hat[j] * scale[j] + shift[j]);
                }
            } else {
                for (int64_t i = 0; i < width; i += l->group) {
                    float inner = 0.0f;
                    for (int64_t j = i; j < i + l->group; j++) inner += g[j] * result[j];
                    for (int64_t j = i; j < i + l->group; j++) g[j] = (g[j] - inner) * result[j];
                }
#pragma omp simd
                for (int64_t j = 0; j < width; j++) hat[j] = (row[j] - m) * d;
            }
            if (parameters) {
#pragma omp simd
                for (int64_t j = 0; j < width; j++) {
                    sums[j] += g[j] * hat[j];
                    sums[width + j] += g[j];
                }
            }
#pragma omp simd reduction(+ : sum, dot)
            for (int64_t j = 0; j < width; j++) {
                g[j] *= scale[j];
                sum += g[j];
                dot += g[j] * hat[j];
            }
            sum *= share;
            dot *= share;
            if (dropout) {
                const float *factor = dropout + r * width;
#pragma omp simd
                for (int64_t j = 0; j < width; j++) g[j] = (g[j] - sum - hat[j] * dot) * d * factor[j];
            } else {
#pragma omp simd
                for (int64_t j = 0; j < width; j++) g[j] = (g[j] - sum - hat[j] * dot) * d;
            }
            if (parameters) {
#pragma omp simd
                for (int64_t j = 0; j < width; j++) sums[2 * width + j] += g[j];
            }
        }
    }
    if (parameters) {
        for (int t = 0; t < teams; t++) {
            const float *sums = all + 4 * width * t;
            for (int64_t j = 0; j < width; j++) {
                d_scale[j] += sums[j];
                d_shift[j] += sums[width + j];
                d_bias[j] += sums[2 * width + j];
            }
        }
    }
    free(all);
}

static int64_t saved_of(const Layer *layers, int64_t count, int64_t rows) {
    int64_t numbers = 0;
    for (int64_t i = 0; i < count; i++)
        if (layers[i].kind != PLAIN) numbers += 2 * rows * layers[i].out + 2 * rows;
    return numbers;
}

/* y [N, out] = input @ weight^T for an input that is given in parts. `once` is memory for the rows of repeated parts. */
static void product(sgemm_t sgemm, const Part *parts, int64_t count, const float *weight, int64_t in, int64_t out,
                    int64_t rows, const float *start, float *y, float *once) {
    const float one = 1.0f;
    float beta = 0.0f;
    int64_t column = 0;
    if (start) { /* initialise every row with the bias */
        for (int64_t r = 0; r < rows; r++) memcpy(y + r * out, start, sizeof(float) * (size_t)out);
        beta = 1.0f;
    }
    for (int64_t i = 0; i < count; i++) {
        const Part *part = parts + i;
        const int64_t own = rows / part->repeat;
        if (part->repeat == 1) {
            sgemm("T", "N", &out, &rows, &part->width, &one, weight + column, &in, part->data, &part->stride, &beta, y, &out);
        } else {
            const float zero = 0.0f;
            sgemm("T", "N", &out, &own, &part->width, &one, weight + column, &in, part->data, &part->stride, &zero, once, &out);
            for (int64_t r = 0; r < rows; r++) {
                const float *from = once + r / part->repeat * out;
                float *to = y + r * out;
                if (beta == 0.0f)
                    memcpy(to, from, sizeof(float) * (size_t)out);
                else
                    for (int64_t j = 0; j < out; j++) to[j] += from[j];
            }
        }
        beta = 1.0f;
        column += part->width;
    }
}

/* Computes out [M, N, out]. `chosen` [M] holds the indices of the members, or is NULL for 0 to M - 1; dropout is
 * [M, N, out of the first layer] or NULL. If `saved` is NULL, nothing is saved for the backward pass. */
void mlp_forward(sgemm_t sgemm, const Layer *layers, int64_t count, const Part *parts, int64_t part_count,
                 const int64_t *chosen, int64_t members, int64_t rows, const float *dropout, float *work, float *saved,
                 float *out, int threads) {
    int64_t widest = 0;
    for (int64_t i = 0; i < count; i++) widest = layers[i].out > widest ? layers[i].out : widest;
    float *pages[2] = {work, work + rows * widest}, *once = work + 2 * rows * widest;
    const int64_t saved_each = saved_of(layers, count, rows);
    for (int64_t m = 0; m < members; m++) {
        const int64_t member = chosen ? chosen[m] : m;
        float *kept = saved ? saved + m * saved_each : NULL;
        const float *x = NULL;
        for (int64_t i = 0; i < count; i++) {
            const Layer *l = layers + i;
            const int64_t size = rows * l->out;
            const Part whole = {x, l->in, l->in, 1};
            const float *weight = l->weight + member * l->in * l->out, *bias = l->bias + member * l->out;
            float *result = i + 1 == count ? out + m * size : pages[i % 2], *y = result;
            if (l->kind == PLAIN) {
                product(sgemm, i ? &whole : parts, i ? 1 : part_count, weight, l->in, l->out, rows, bias, y, once);
            } else {
                float *mean = NULL, *rstd = NULL;
                if (kept) {
                    y = kept;
                    mean = kept + size;
                    rstd = mean + rows;
                    result = rstd + rows;
                    kept = result + size;
                }
                product(sgemm, i ? &whole : parts, i ? 1 : part_count, weight, l->in, l->out, rows, NULL, y, once);
                finish(l, bias, l->scale + member * l->out, l->shift + member * l->out,
                       i == 0 && dropout ? dropout + m * size : NULL, rows, y, mean, rstd, result, threads);
                if (kept && i + 1 == count) memcpy(out + m * size, result, sizeof(float) * (size_t)size);
            }
            x = result;
        }
    }
}

/* Open-loop rollout of S sequences of actions [H, N * S, A] from each of the states [N, L]: computes the states after
 * every action [H, N * S, L], and the outputs of the head for every state and the action taken there [H, N * S, K].
 * `work` holds three times the output of the widest layer for (H - 1) * N * S rows, or N * S if that is more. */
void mlp_rollout(sgemm_t sgemm, const Layer *next, int64_t next_count, const Layer *head, int64_t head_count,
                 const float *state, const float *actions, int64_t steps, int64_t groups, int64_t sequences,
                 int64_t action_width, float *work, float *states, float *heads, int threads) {
    const int64_t rows = groups * sequences, width = next[next_count - 1].out, out = head[head_count - 1].out;
    Part parts[2] = {{state, width, width, sequences}, {actions, action_width, action_width, 1}};
    mlp_forward(sgemm, head, head_count, parts, 2, NULL, 1, rows, NULL, work, NULL, heads, threads);
    for (int64_t t = 0; t < steps; t++) {
        float *after = states + t * rows * width;
        parts[1].data = actions + t * rows * action_width;
        mlp_forward(sgemm, next, next_count, parts, 2, NULL, 1, rows, NULL, work, NULL, after, threads);
        parts[0] = (Part){after, width, width, 1};
    }
    if (steps == 1) return;
    parts[0].data = states;
    parts[1].data = actions + rows * action_width;
    mlp_forward(sgemm, head, head_count, parts, 2, NULL, 1, (steps - 1) * rows, NULL, work, NULL, heads + rows * out,
                threads);
}

/* Computes gradients from the gradient of the output [M, N, out]. For each layer, `d_layers` points to the arrays to
 * which the gradients of weight, bias, scale and shift of all members are added; it may be NULL. `d_parts` points to the
 * arrays to which the gradients of the parts, summed over the members, are written; each may be NULL. No part may be
 * repeated. `work` holds twice the output of the widest layer for all rows, and three times that in the forward pass. */
void mlp_backward(sgemm_t sgemm, const Layer *layers, int64_t count, const Part *parts, int64_t part_count,
                  const int64_t *chosen, int64_t members, int64_t rows, const float *dropout, const float *saved,
                  const float *grad, float *const *d_layers, float *const *d_parts, float *work, int threads) {
    const float one = 1.0f, zero = 0.0f;
    int64_t widest = 0;
    for (int64_t i = 0; i < count; i++) widest = layers[i].out > widest ? layers[i].out : widest;
    const int64_t saved_each = saved_of(layers, count, rows);
    for (int64_t m = 0; m < members; m++) {
        const int64_t member = chosen ? chosen[m] : m;
        const float *kept = saved + (m + 1) * saved_each, *d = grad + m * rows * layers[count - 1].out;
        float *pages[2] = {work, work + rows * widest};
        for (int64_t i = count - 1; i >= 0; i--) {
            const Layer *l = layers + i;
            const int64_t size = rows * l->out;
            float *const *d_own = d_layers ? d_layers + 4 * i : NULL;
            const float *weight = l->weight + member * l->in * l->out;
            if (l->kind == PLAIN) {
                if (d_own) {
                    float *d_bias = d_own[1] + member * l->out;
                    for (int64_t r = 0; r < rows; r++)
                        for (int64_t j = 0; j < l->out; j++) d_bias[j] += d[r * l->out + j];
                }
            } else {
                kept -= 2 * size + 2 * rows;
                float *page = pages[i % 2];
                if (d != page) memcpy(page, d, sizeof(float) * (size_t)size);
                unfinish(l, l->scale + member * l->out, l->shift + member * l->out,
                         i == 0 && dropout ? dropout + m * size : NULL, rows, kept, kept + size, kept + size + rows,
                         kept + size + 2 * rows, page, d_own ? d_own[1] + member * l->out : NULL,
                         d_own ? d_own[2] + member * l->out : NULL, d_own ? d_own[3] + member * l->out : NULL, threads);
                d = page;
            }
            if (i > 0) { /* the layer below has a norm; its output precedes what this layer saved */
                const float *x = (l->kind == PLAIN ? saved + (m + 1) * saved_each : kept) - rows * l->in;
                if (d_own)
                    sgemm("N", "T", &l->in, &l->out, &rows, &one, x, &l->in, d, &l->out, &one,
                          d_own[0] + member * l->in * l->out, &l->in);
                float *below = pages[(i - 1) % 2];
                sgemm("N", "N", &l->in, &rows, &l->out, &one, weight, &l->in, d, &l->out, &zero, below, &l->in);
                d = below;
                continue;
            }
            int64_t column = 0;
            for (int64_t p = 0; p < part_count; p++) {
                const Part *part = parts + p;
                if (d_own)
                    sgemm("N", "T", &part->width, &l->out, &rows, &one, part->data, &part->stride, d,
                          &l->out, &one, d_own[0] + member * l->in * l->out + column, &l->in);
                if (d_parts[p])
                    sgemm("N", "N", &part->width, &rows, &l->out, &one, weight + column, &l->in, d, &l->out,
                          m ? &one : &zero, d_parts[p], &part->width);
                column += part->width;
            }
        }
    }
}
