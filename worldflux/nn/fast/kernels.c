/* The small operations of DreamerV3 for one CPU core: float32, row-major, in one pass where torch takes several. Matrix
 * products use the BLAS that comes with torch. The comment of each function names the torch code that defines it.
 * `worldflux.nn.fast.kernels` compiles and loads this file. */

#include <math.h>
#include <string.h>

typedef void (*sgemm_t)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                        const int *, const float *, const int *, const float *, float *, const int *);
static sgemm_t sgemm;

void set_sgemm(sgemm_t function) { sgemm = function; }

#define SIMD _Pragma("omp simd") /* iterations are independent, even if arrays coincide */
#define TOP _Pragma("omp simd reduction(max : top)")
#define SUM _Pragma("omp simd reduction(+ : sum)")

/* y[n, out] = beta * y + x[n, in] w^T with w[out, in]; ld*: distance between rows. */
static void times_transposed(int n, int out, int in, const float *x, int ldx, const float *w, int ldw, float beta,
                             float *y, int ldy) {
    const float one = 1;
    sgemm("T", "N", &out, &n, &in, &one, w, &ldw, x, &ldx, &beta, y, &ldy);
}

/* y[n, out] = beta * y + x[n, in] w with w[in, out]. */
static void times(int n, int out, int in, const float *x, int ldx, const float *w, int ldw, float beta, float *y,
                  int ldy) {
    const float one = 1;
    sgemm("N", "N", &out, &n, &in, &one, w, &ldw, x, &ldx, &beta, y, &ldy);
}

/* w[out, in] = beta * w + g[n, out]^T x[n, in]: the gradient of a kernel. */
static void outer(int n, int out, int in, const float *g, int ldg, const float *x, int ldx, float beta, float *w,
                  int ldw) {
    const float one = 1;
    sgemm("N", "T", &in, &out, &n, &one, x, &ldx, g, &ldg, &beta, w, &ldw);
}

/* exp, accurate to the last one or two bits; NaN stays NaN. */
static inline float exp_(float x) {
    x = x > 88.f ? 88.f : x < -87.f ? -87.f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + .5f;
    p = p * r + 1;
    p = p * r + 1;
    union {
        int i;
        float f;
    } power = {((int)n + 127) << 23};
    return p * power.f;
}

static inline float sigmoid(float x) { return 1 / (1 + exp_(-x)); }

static inline float tanh_(float x) { return 2 * sigmoid(2 * x) - 1; }

/* RMS norm and SiLU of x + bias (`worldflux.nn.layers.NormSiLU`). x is overwritten with the normalised rows, and
 * `inverse` with the factors that normalised them. */
static void norm_silu(int n, int h, const float *bias, const float *scale, float *x, float *inverse, float *y, int ldy) {
    for (int i = 0; i < n; i++, x += h, y += ldy) {
        float sum = 0;
        if (bias) SUM for (int j = 0; j < h; j++) {
                float v = x[j] + bias[j];
                x[j] = v;
                sum += v * v;
            }
        else
            SUM for (int j = 0; j < h; j++) sum += x[j] * x[j];
        float factor = 1 / sqrtf(sum / h + 1e-4f);
        inverse[i] = factor;
        SIMD for (int j = 0; j < h; j++) {
            float v = x[j] * factor, z = v * scale[j];
            x[j] = v;
            y[j] = z * sigmoid(z);
        }
    }
}

/* Gradient of norm_silu (`worldflux.nn.layers.norm_silu_backward`): turns `grad`, the gradient of y, into that of x, and
 * adds the gradients of scale and bias to `d_scale` and `d_bias`, which may be NULL. */
static void norm_silu_backward(int n, int h, const float *x, const float *inverse, const float *scale, float *grad,
                               float *d_scale, float *d_bias) {
    for (int i = 0; i < n; i++, x += h, grad += h) {
        float sum = 0;
        SUM for (int j = 0; j < h; j++) {
            float z = x[j] * scale[j], s = sigmoid(z);
            float g = grad[j] * (s * (1 + z * (1 - s)));
            d_scale[j] += g * x[j];
            g *= scale[j];
            grad[j] = g;
            sum += g * x[j];
        }
        float along = sum / h, factor = inverse[i];
        SIMD for (int j = 0; j < h; j++) grad[j] = (grad[j] - along * x[j]) * factor;
        if (d_bias)
            SIMD for (int j = 0; j < h; j++) d_bias[j] += grad[j];
    }
}

/* Linear layer, RMS norm and SiLU from x[n, in] to y[n, out]; saves `normed` [n, out] and `inverse` [n] for the
 * gradient. */
static void layer(int n, int in, int out, const float *x, int ldx, const float *const *w, float *normed,
                  float *inverse, float *y) {
    times_transposed(n, out, in, x, ldx, w[0], in, 0, normed, out);
    norm_silu(n, out, w[1], w[2], normed, inverse, y, out);
}

typedef struct {
    int layers, units, kept;     /* kept: rows of the arrays saved for the gradient; fewer than n if nothing is saved */
    const float *const *weights; /* kernel, bias and scale of each layer */
    float *normed, *inverse;     /* [layers, kept, units], [layers, kept] */
    float *hidden, *out;         /* [layers - 1, kept, units], [n, units] */
    const float *grad;           /* gradient of `out` */
    float *const *d_weights;     /* as `weights`; the entry of the first kernel is not used */
} Mlp;

enum { PORTION = 256 }; /* number of rows whose activations stay in the cache between layers */

static int least(int a, int b) { return a < b ? a : b; }

/* Several MLPs (`worldflux.nn.layers.MLP`) on one input x[n, in]. Their first kernels are concatenated in `kernel`
 * [total, in] for one wide product, which is faster than several narrow ones. `memory` is [PORTION, total]. */
void mlps(int n, int in, const float *x, int total, const float *kernel, int count, const Mlp *each, float *memory) {
    for (int first = 0; first < n; first += PORTION) {
        int rows = least(PORTION, n - first), offset = 0;
        times_transposed(rows, total, in, x + (long)first * in, in, kernel, in, 0, memory, total);
        for (const Mlp *m = each; m < each + count; offset += m->units, m++) {
            int u = m->units;
            const float *input = NULL;
            for (int l = 0; l < m->layers; l++) {
                long row = (long)l * m->kept + (m->kept < n ? 0 : first);
                float *y = l == m->layers - 1 ? m->out + (long)first * u : m->hidden + row * u;
                float *normed = m->normed + row * u;
                const float *const *w = m->weights + 3 * l;
                if (l)
                    times_transposed(rows, u, u, input, u, w[0], u, 0, normed, u);
                else
                    for (int i = 0; i < rows; i++)
                        memcpy(normed + (long)i * u, memory + (long)i * total + offset, u * sizeof(float));
                norm_silu(rows, u, w[1], w[2], normed, m->inverse + row, y, u);
                input = y;
            }
        }
    }
}

/* Gradients of `mlps`. Those of the first kernels are written to d_kernel [total, in]; d_x [n, in] may be NULL. `memory`
 * is [PORTION, total] followed by [2, PORTION, units of the widest MLP]. */
void mlps_backward(int n, int in, const float *x, float *d_x, int total, const float *kernel, float *d_kernel,
                   int count, const Mlp *each, float *memory) {
    for (const Mlp *m = each; m < each + count; m++)
        for (int l = 0; l < m->layers; l++) {
            memset(m->d_weights[3 * l + 1], 0, m->units * sizeof(float));
            memset(m->d_weights[3 * l + 2], 0, m->units * sizeof(float));
        }
    for (int first = 0; first < n; first += PORTION) {
        int rows = least(PORTION, n - first), offset = 0;
        for (const Mlp *m = each; m < each + count; offset += m->units, m++) {
            int u = m->units;
            float *grad = memory + (long)PORTION * total, *next = grad + (long)PORTION * u;
            memcpy(grad, m->grad + (long)first * u, (long)rows * u * sizeof(float));
            for (int l = m->layers - 1; l >= 0; l--) {
                long row = (long)l * n + first;
                const float *const *w = m->weights + 3 * l;
                float *const *d = m->d_weights + 3 * l, *swap = grad;
                norm_silu_backward(rows, u, m->normed + row * u, m->inverse + row, w[2], grad, d[2], d[1]);
                if (l) {
                    outer(rows, u, u, grad, u, m->hidden + (row - n) * u, u, first > 0, d[0], u);
                    times(rows, u, u, grad, u, w[0], u, 0, next, u);
                    grad = next, next = swap;
                } else
                    for (int i = 0; i < rows; i++)
                        memcpy(memory + (long)i * total + offset, grad + (long)i * u, u * sizeof(float));
            }
        }
        outer(rows, total, in, memory, total, x + (long)first * in, in, first > 0, d_kernel, in);
        if (d_x) times(rows, in, total, memory, total, kernel, in, 0, d_x + (long)first * in, in);
    }
}

/* Softmax of n groups of c numbers each, in place. `noipa` keeps gcc from specialising the function for known n and c,
 * because it does not vectorise the specialised copies. */
__attribute__((noipa)) static void softmax(int n, int c, float *x) {
    for (int i = 0; i < n; i++) {
        float *row = x + (long)i * c, top = row[0];
        TOP for (int j = 1; j < c; j++) top = row[j] > top ? row[j] : top;
        for (int j = 0; j < c; j++) row[j] -= top;
    }
    SIMD for (long j = 0; j < (long)n * c; j++) x[j] = exp_(x[j]);
    for (int i = 0; i < n; i++) {
        float *row = x + (long)i * c, sum = 0;
        SUM for (int j = 0; j < c; j++) sum += row[j];
        for (int j = 0; j < c; j++) row[j] /= sum;
    }
}

/* Probabilities and means of n two-hot distributions (`worldflux.nn.distributions.TwoHot`). Two mirrored bins count as
 * equal if their probabilities differ by no more than `share` of their sum. */
void two_hot(int n, int bins, const float *logits, const float *values, float share, float *probs, float *mean) {
    const int middle = bins / 2;
    for (int i = 0; i < n; i++) {
        memcpy(probs + (long)i * bins, logits + (long)i * bins, sizeof(float) * bins);
        const float *lower = probs + (long)i * bins, *upper = lower + middle + 1, *value = values + middle + 1;
        float sum = 0;
        softmax(1, bins, probs + (long)i * bins);
        SUM for (int j = 0; j < middle; j++) {
            float u = upper[j], l = lower[middle - 1 - j], excess = u - l;
            sum += excess * (fabsf(excess) > share * (u + l) ? value[j] : 0);
        }
        mean[i] = sum;
    }
}

/* Draws one of c classes with one uniform random number (`worldflux.nn.distributions.inverse_cdf`). */
static int draw(int c, const float *probs, float unimix, float uniform) {
    float limit = uniform * (float)(1 - 1e-6);
    double total = 0;
    int drawn = 0;
    for (int j = 0; j < c; j++) {
        total += (1 - unimix) * probs[j] + unimix / c;
        drawn += (float)total <= limit;
    }
    return drawn < c ? drawn : c - 1;
}

/* One step of the gated cell (`RSSM.core`). `gates` [n, g, 3, w], given without bias, is overwritten with the reset gate,
 * the input of the candidate and the update gate; `candidate` [n, g * w] is saved for the gradient. */
static void cell(int n, int g, int w, const float *bias, float *gates, const float *before, int ldb, float *candidate,
                 float *after, int lda) {
    for (int i = 0; i < n; i++)
        for (int k = 0; k < g; k++) {
            float *reset = gates + ((long)i * g + k) * 3 * w, *input = reset + w, *update = input + w;
            const float *b = bias + k * 3 * w, *old = before + (long)i * ldb + k * w;
            float *kept = candidate + ((long)i * g + k) * w, *next = after + (long)i * lda + k * w;
            SIMD for (int j = 0; j < w; j++) {
                float r = sigmoid(reset[j] + b[j]), c = input[j] + b[w + j], u = sigmoid(update[j] + b[2 * w + j] - 1);
                float t = tanh_(r * c);
                reset[j] = r, input[j] = c, update[j] = u, kept[j] = t;
                next[j] = old[j] + u * (t - old[j]);
            }
        }
}

/* Gradient of `cell`: turns `grad` [n, g * w], the gradient of the new state, into the part that reaches the old state
 * directly, and `gates` into the gradient of the gates' linear layer; adds to d_bias [g * 3 * w]. */
static void cell_backward(int n, int g, int w, float *gates, const float *before, const float *candidate, float *grad,
                          float *d_gates, float *d_bias) {
    for (int i = 0; i < n; i++)
        for (int k = 0; k < g; k++) {
            const float *reset = gates + ((long)i * g + k) * 3 * w, *input = reset + w, *update = input + w;
            const float *old = before + ((long)i * g + k) * w, *kept = candidate + ((long)i * g + k) * w;
            float *d = d_gates + ((long)i * g + k) * 3 * w, *b = d_bias + k * 3 * w, *new = grad + ((long)i * g + k) * w;
            SIMD for (int j = 0; j < w; j++) {
                float r = reset[j], c = input[j], u = update[j], t = kept[j], gr = new[j];
                float inner = gr * u * (1 - t * t);
                d[j] = inner * c * r * (1 - r);
                d[w + j] = inner * r;
                d[2 * w + j] = gr * (t - old[j]) * u * (1 - u);
                new[j] = gr - gr * u;
            }
            SIMD for (int j = 0; j < 3 * w; j++) b[j] += d[j];
        }
}

/* Block-diagonal product of g blocks: y[n, g * o] = beta * y + x[n, g * i] @ w[g, i, o], or with w^T. */
static void blocks(int n, int g, int i, int o, const float *x, int ldx, const float *w, long stride, int transposed,
                   float beta, float *y) {
    for (int k = 0; k < g; k++)
        if (transposed)
            times_transposed(n, o, i, x + k * i, ldx, w + k * stride, i, beta, y + k * o, g * o);
        else
            times(n, o, i, x + k * i, ldx, w + k * stride, o, beta, y + k * o, g * o);
}

typedef struct {
    int D, g, h, S, C, A, F, units, actor_layers, parts; /* parts: number of softmaxes of the policy, 0 if it is normal */
    float unimix;
    const int *widths; /* widths of the softmaxes */
    /* Kernel [out, in], bias and scale of each layer; layers without a norm have no scale. */
    const float *deter_in[3], *stoch_in[3], *action_in[3], *prior_in[6], *prior_out[2], *policy_out[2], *std_out[2];
    const float *const *actor;
    const float *stoch_columns, *actor_columns; /* [S * C, h] and [S * C, units]: transposed kernels for the latents */
    const float *recurrent; /* [g, D / g, D / g] */
    long recurrent_stride;
    const float *dense, *hidden_bias, *hidden_scale; /* [3 * h, D] */
    const float *gates, *gates_bias;                 /* [g, D / g, 3 * D / g] */
} Model;

/* Adds the columns of the kernel for the classes of the latents to y[n, out]. */
static void add_columns(int n, int S, int C, int out, const int *classes, const float *columns, float *y) {
    for (int i = 0; i < n; i++)
        for (int s = 0; s < S; s++) {
            const float *column = columns + (long)(s * C + classes[i * S + s]) * out;
            float *row = y + (long)i * out;
            SIMD for (int j = 0; j < out; j++) row[j] += column[j];
        }
}

/* Draws actions of the policy for features whose latents have the given classes. */
static void act(const Model *m, int n, const float *feat, const int *classes, const float *noise, float *action,
                float *a, float *b, float *inverse) {
    times_transposed(n, m->units, m->D, feat, m->F, m->actor[0], m->F, 0, a, m->units);
    add_columns(n, m->S, m->C, m->units, classes, m->actor_columns, a);
    norm_silu(n, m->units, m->actor[1], m->actor[2], a, inverse, b, m->units);
    for (int l = 1; l < m->actor_layers; l++) {
        float *swap = a;
        layer(n, m->units, m->units, b, m->units, m->actor + 3 * l, a, inverse, a);
        a = b, b = swap;
    }
    int A = m->A;
    times_transposed(n, A, m->units, b, m->units, m->policy_out[0], m->units, 0, a, A);
    if (!m->parts) {
        float *std = a + (long)n * A;
        times_transposed(n, A, m->units, b, m->units, m->std_out[0], m->units, 0, std, A);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < A; j++) {
                float mean = tanh_(a[i * A + j] + m->policy_out[1][j]);
                float spread = 0.9f * sigmoid(std[i * A + j] + m->std_out[1][j] + 2) + 0.1f;
                action[i * A + j] = mean + spread * noise[i * A + j];
            }
        return;
    }
    memset(action, 0, (long)n * A * sizeof(float));
    for (int i = 0; i < n; i++) {
        float *logits = a + (long)i * A, *row = action + (long)i * A;
        for (int j = 0; j < A; j++) logits[j] += m->policy_out[1][j];
        for (int part = 0; part < m->parts; logits += m->widths[part], row += m->widths[part], part++) {
            softmax(1, m->widths[part], logits);
            row[draw(m->widths[part], logits, 0, noise[i * m->parts + part])] = 1;
        }
    }
}

static int most(int a, int b) { return a > b ? a : b; }

/* Number of floats of working memory that `imagine` needs for each row. */
int imagine_memory(const Model *m) {
    int wide = most(most(m->S * m->C, 2 * m->A), most(m->h, m->units));
    return 5 * m->D + 3 * m->h + 2 * wide + m->A + m->S + 1;
}

/* Rolls out the policy in the model (`worldflux.models.dreamerv3.rollout`) for rows [first, first + n) of N.
 *
 * feats is [H + 1, N, D + S * C], with the first step given; actions is [H + 1, N, A]; uniform [H, N, S] holds the random
 * numbers for the latents, and noise [H + 1, N, parts or A] those for the actions. */
void imagine(const Model *m, int H, int N, int first, int n, float *feats, float *actions, const float *uniform,
             const float *noise, float *memory) {
    int D = m->D, g = m->g, w = D / g, h = m->h, S = m->S, C = m->C, A = m->A, F = m->F, per = m->parts ? m->parts : A;
    int wide = most(most(S * C, 2 * A), most(h, m->units));
    float *hidden = memory, *gates = hidden + (long)n * D, *candidate = gates + (long)n * 3 * D;
    float *shared = candidate + (long)n * D, *a = shared + (long)n * 3 * h, *b = a + (long)n * wide;
    float *bounded = b + (long)n * wide, *inverse = bounded + (long)n * A;
    int *classes = (int *)(inverse + n);
    for (int i = 0; i < n; i++)
        for (int s = 0; s < S; s++) {
            const float *row = feats + (long)(first + i) * F + D + s * C;
            int likeliest = 0;
            for (int j = 1; j < C; j++) likeliest = row[j] > row[likeliest] ? j : likeliest;
            classes[i * S + s] = likeliest;
        }
    for (int t = 0; t <= H; t++) {
        float *feat = feats + ((long)t * N + first) * F, *action = actions + ((long)t * N + first) * A;
        if (t) {
            const float *before = feat - (long)N * F, *taken = action - (long)N * A;
            times_transposed(n, h, D, before, F, m->deter_in[0], D, 0, a, h);
            norm_silu(n, h, m->deter_in[1], m->deter_in[2], a, inverse, shared, 3 * h);
            memset(a, 0, (long)n * h * sizeof(float));
            add_columns(n, S, C, h, classes, m->stoch_columns, a);
            norm_silu(n, h, m->stoch_in[1], m->stoch_in[2], a, inverse, shared + h, 3 * h);
            for (int j = 0; j < n * A; j++) {
                float size = fabsf(taken[j]);
                bounded[j] = size > 1 ? taken[j] / size : taken[j];
            }
            times_transposed(n, h, A, bounded, A, m->action_in[0], A, 0, a, h);
            norm_silu(n, h, m->action_in[1], m->action_in[2], a, inverse, shared + 2 * h, 3 * h);
            times(n, D, 3 * h, shared, 3 * h, m->dense, D, 0, hidden, D);
            blocks(n, g, w, w, before, F, m->recurrent, m->recurrent_stride, 0, 1, hidden);
            norm_silu(n, D, m->hidden_bias, m->hidden_scale, hidden, inverse, hidden, D);
            blocks(n, g, w, 3 * w, hidden, D, m->gates, 3l * w * w, 0, 0, gates);
            cell(n, g, w, m->gates_bias, gates, before, F, candidate, feat, F);
            layer(n, D, h, feat, F, m->prior_in, a, inverse, b);
            layer(n, h, h, b, h, m->prior_in + 3, a, inverse, shared);
            times_transposed(n, S * C, h, shared, h, m->prior_out[0], h, 0, a, S * C);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < S * C; j++) a[(long)i * S * C + j] += m->prior_out[1][j];
            softmax(n * S, C, a);
            const float *numbers = uniform + ((long)(t - 1) * N + first) * S;
            for (int i = 0; i < n; i++) {
                memset(feat + (long)i * F + D, 0, S * C * sizeof(float));
                for (int s = 0; s < S; s++) {
                    int drawn = draw(C, a + ((long)i * S + s) * C, m->unimix, numbers[(long)i * S + s]);
                    classes[i * S + s] = drawn;
                    feat[(long)i * F + D + s * C + drawn] = 1;
                }
            }
        }
        act(m, n, feat, classes, noise + ((long)t * N + first) * per, action, a, b, inverse);
    }
}

typedef struct {
    int T, N, ld_posterior;              /* distance between rows of the posterior's kernel */
    const float *stoch_kernel, *posterior_kernel, *posterior_scale, *latents[2];
    const float *keep, *action_part, *embed_part, *uniform; /* [T, N], [T, N, D], [T, N, h], [T, N, S] */
    const long long *classes;                               /* [T, N, S] classes to use instead of drawing them, or NULL */
    float *deter, *stoch;                                   /* [T + 1, N, D], [T + 1, N, S * C], with the first step given */
    float *logits, *probs;                                  /* [T, N, S * C]; the arrays that follow are [T, N, ...] too */
    float *deter_x, *stoch_x, *deter_normed, *stoch_normed, *inputs, *hidden_normed, *hidden, *gates, *candidate;
    float *posterior_normed, *posterior_hidden, *inverse; /* D, S * C, h, h, 2 * h, D, D, 3 * D, D, h, h wide; 4 */
    /* For the gradient; `d_deter`, `d_stoch` and `d_logits` hold the gradients of the results and are overwritten. */
    float *d_deter, *d_stoch, *d_logits, *d_action, *d_embed, *d_deter_in, *d_stoch_in, *d_gates, *before;
    float *d_weights[15]; /* as `CoreWeights` and `PosteriorWeights` of `worldflux.models.dreamerv3.fast.cell` */
} Window;

/* Computes the states along replayed windows (`worldflux.models.dreamerv3.fast.scan.observe_step`). */
void observe(const Model *m, const Window *v) {
    int N = v->N, D = m->D, g = m->g, w = D / g, h = m->h, S = m->S, C = m->C, L = S * C;
    for (long t = 0; t < v->T; t++) {
        long r = t * N;
        float *x = v->deter_x + r * D, *stoch_x = v->stoch_x + r * L, *inverse = v->inverse + 4 * r;
        for (int i = 0; i < N; i++) {
            float keep = v->keep[r + i];
            for (int j = 0; j < D; j++) x[(long)i * D + j] = v->deter[(r + i) * D + j] * keep;
            for (int j = 0; j < L; j++) stoch_x[(long)i * L + j] = v->stoch[(r + i) * L + j] * keep;
        }
        float *normed = v->deter_normed + r * h, *inputs = v->inputs + r * 2 * h, *hidden = v->hidden_normed + r * D;
        times_transposed(N, h, D, x, D, m->deter_in[0], D, 0, normed, h);
        norm_silu(N, h, m->deter_in[1], m->deter_in[2], normed, inverse, inputs, 2 * h);
        normed = v->stoch_normed + r * h;
        times_transposed(N, h, L, stoch_x, L, v->stoch_kernel, L, 0, normed, h);
        norm_silu(N, h, m->stoch_in[1], m->stoch_in[2], normed, inverse + N, inputs + h, 2 * h);
        memcpy(hidden, v->action_part + r * D, sizeof(float) * N * D);
        times(N, D, 2 * h, inputs, 2 * h, m->dense, D, 1, hidden, D);
        blocks(N, g, w, w, x, D, m->recurrent, m->recurrent_stride, 0, 1, hidden);
        norm_silu(N, D, NULL, m->hidden_scale, hidden, inverse + 2 * N, v->hidden + r * D, D);
        blocks(N, g, w, 3 * w, v->hidden + r * D, D, m->gates, 3l * w * w, 0, 0, v->gates + r * 3 * D);
        float *deter = v->deter + (r + N) * D, *logits = v->logits + r * L, *probs = v->probs + r * L;
        cell(N, g, w, m->gates_bias, v->gates + r * 3 * D, x, D, v->candidate + r * D, deter, D);
        normed = v->posterior_normed + r * h;
        memcpy(normed, v->embed_part + r * h, sizeof(float) * N * h);
        times_transposed(N, h, D, deter, D, v->posterior_kernel, v->ld_posterior, 1, normed, h);
        norm_silu(N, h, NULL, v->posterior_scale, normed, inverse + 3 * N, v->posterior_hidden + r * h, h);
        times_transposed(N, L, h, v->posterior_hidden + r * h, h, v->latents[0], h, 0, logits, L);
        for (int i = 0; i < N; i++)
            for (int j = 0; j < L; j++) logits[(long)i * L + j] += v->latents[1][j];
        memcpy(probs, logits, sizeof(float) * N * L);
        softmax(N * S, C, probs);
        float *stoch = v->stoch + (r + N) * L;
        memset(stoch, 0, sizeof(float) * N * L);
        for (long i = 0; i < (long)N * S; i++) {
            long at = r * S + i;
            stoch[i * C + (v->classes ? v->classes[at] : draw(C, probs + i * C, m->unimix, v->uniform[at]))] = 1;
        }
    }
}

/* Gradients of `observe` (`worldflux.models.dreamerv3.fast.scan.observe_step_backward`), then those of the weights. */
void observe_backward(const Model *m, const Window *v) {
    int N = v->N, D = m->D, g = m->g, w = D / g, h = m->h, S = m->S, C = m->C, L = S * C, all = v->T * N;
    float *const *d = v->d_weights;
    const int sums[] = {1, 2, 4, 5, 8, 10, 12}, widths[] = {h, h, h, h, D, 3 * D, h};
    for (int i = 0; i < 7; i++) memset(d[sums[i]], 0, widths[i] * sizeof(float));
    float *before_deter = v->before, *before_stoch = v->before + (long)N * D;
    memset(v->before, 0, sizeof(float) * N * (D + L));
    for (long t = v->T - 1; t >= 0; t--) {
        long r = t * N;
        float *grad = v->d_deter + r * D, *logits = v->d_logits + r * L, *inverse = v->inverse + 4 * r;
        float *d_embed = v->d_embed + r * h, *hidden = v->d_action + r * D, *d_gates = v->d_gates + r * 3 * D;
        float *deter_in = v->d_deter_in + r * h, *stoch_in = v->d_stoch_in + r * h;
        for (long j = 0; j < (long)N * D; j++) grad[j] += before_deter[j];
        for (long i = 0; i < (long)N * S; i++) {
            const float *probs = v->probs + (r * S + i) * C;
            float *row = logits + i * C, *through = before_stoch + i * C, sum = 0;
            for (int j = 0; j < C; j++) {
                through[j] = (1 - m->unimix) * (through[j] + v->d_stoch[(r * S + i) * C + j]) * probs[j];
                sum += through[j];
            }
            for (int j = 0; j < C; j++) row[j] += through[j] - probs[j] * sum;
        }
        times(N, h, L, logits, L, v->latents[0], h, 0, d_embed, h);
        norm_silu_backward(N, h, v->posterior_normed + r * h, inverse + 3 * N, v->posterior_scale, d_embed, d[12], NULL);
        times(N, D, h, d_embed, h, v->posterior_kernel, v->ld_posterior, 1, grad, D);
        cell_backward(N, g, w, v->gates + r * 3 * D, v->deter_x + r * D, v->candidate + r * D, grad, d_gates, d[10]);
        blocks(N, g, 3 * w, w, d_gates, 3 * D, m->gates, 3l * w * w, 1, 0, hidden);
        norm_silu_backward(N, D, v->hidden_normed + r * D, inverse + 2 * N, m->hidden_scale, hidden, d[8], NULL);
        blocks(N, g, w, w, hidden, D, m->recurrent, m->recurrent_stride, 1, 1, grad);
        times_transposed(N, h, D, hidden, D, m->dense, D, 0, deter_in, h);
        times_transposed(N, h, D, hidden, D, m->dense + (long)h * D, D, 0, stoch_in, h);
        norm_silu_backward(N, h, v->deter_normed + r * h, inverse, m->deter_in[2], deter_in, d[2], d[1]);
        norm_silu_backward(N, h, v->stoch_normed + r * h, inverse + N, m->stoch_in[2], stoch_in, d[5], d[4]);
        times(N, D, h, deter_in, h, m->deter_in[0], D, 1, grad, D);
        times(N, L, h, stoch_in, h, v->stoch_kernel, L, 0, before_stoch, L);
        for (int i = 0; i < N; i++) {
            float keep = v->keep[r + i];
            for (int j = 0; j < D; j++) before_deter[(long)i * D + j] = grad[(long)i * D + j] * keep;
            for (int j = 0; j < L; j++) before_stoch[(long)i * L + j] *= keep;
        }
    }
    const float *deter = v->deter + (long)N * D;
    outer(all, h, D, v->d_deter_in, h, v->deter_x, D, 0, d[0], D);
    outer(all, h, L, v->d_stoch_in, h, v->stoch_x, L, 0, d[3], L);
    for (int k = 0; k < g; k++) {
        outer(all, w, w, v->deter_x + k * w, D, v->d_action + k * w, D, 0, d[6] + (long)k * w * w, w);
        outer(all, w, 3 * w, v->hidden + k * w, D, v->d_gates + k * 3 * w, 3 * D, 0, d[9] + (long)k * 3 * w * w, 3 * w);
    }
    outer(all, 2 * h, D, v->inputs, 2 * h, v->d_action, D, 0, d[7], D);
    outer(all, h, D, v->d_embed, h, deter, D, 0, d[11], D);
    outer(all, L, h, v->d_logits, L, v->posterior_hidden, h, 0, d[13], h);
    memset(d[14], 0, L * sizeof(float));
    for (long i = 0; i < all; i++)
        for (int j = 0; j < L; j++) d[14][j] += v->d_logits[i * L + j];
}

/* Returns whether the BLAS has the expected calling convention. */
int works(void) {
    const float x[] = {1, 2, 3, 4, 5, 6}, w[] = {1, 0, 2, 0, 1, 1};
    float y[4] = {0};
    times_transposed(2, 2, 3, x, 3, w, 3, 0, y, 2);
    return y[0] == 7 && y[1] == 5 && y[2] == 16 && y[3] == 11;
}

/* Squared norm of n numbers: partial sums in single precision, accumulated in double precision. */
static double squares(long n, const float *x) {
    double total = 0;
    for (long i = 0; i < n; i += 4096) {
        long end = i + 4096 < n ? i + 4096 : n;
        float sum = 0;
        SUM for (long j = i; j < end; j++) sum += x[j] * x[j];
        total += sum;
    }
    return total;
}

/* One update of `count` tensors (`worldflux.training.optim.LaProp`); agc 0 disables clipping. */
void laprop(int count, const long *sizes, float *const *parameters, const float *const *grads, float *const *mus,
            float *const *nus, float agc, float least_norm, float beta1, float beta2, float eps, float share, float keep,
            float rate) {
    for (int t = 0; t < count; t++) {
        float *p = parameters[t], *mu = mus[t], *nu = nus[t], factor = 1;
        const float *g = grads[t];
        if (agc) {
            double norm = sqrt(squares(sizes[t], p));
            double excess = sqrt(squares(sizes[t], g)) / (agc * (norm < least_norm ? least_norm : norm));
            factor = excess <= 1 ? 1 : 1 / excess; /* NaN stays NaN */
        }
        SIMD for (long j = 0; j < sizes[t]; j++) {
            float grad = g[j] * factor, n = beta2 * nu[j] + (1 - beta2) * grad * grad;
            float m = beta1 * mu[j] + share * grad / (sqrtf(n) + eps);
            nu[j] = n;
            mu[j] = m;
            p[j] = keep * p[j] + rate * m;
        }
    }
}
