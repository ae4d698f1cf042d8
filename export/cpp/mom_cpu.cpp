// A MoM model's layers as operators of ONNX Runtime for the CPU: domain "mom", float32.
//
// DecodeLayer   a block for one token of each sequence: norm, routing, convolution, rule, output norm and gate, MLP
//   inputs      x [B, 1, D], attention norm [D], small [D, P] (router, then b and a of the rule), qkv [D, N], N = H K +
//               G (H K + HV V), output gate [D, HV V] or none, convolution [C, W] or none, A_log and dt_bias [HV] or
//               none, o norm [V], o [HV V, D], MLP norm [D], gate and up [D, F], down [F, D],
//               recurrent state [B, M' HV, K, V], convolution's state [B, M' C, W - 1] or none
//   outputs     x [B, 1, D], the states after the token; a state that has the memory of the past one is changed in place
//   attributes  heads, value_heads, memories, topk, shared, rule, eps, scale
// Memories      the same from the products on, for any number of tokens: routing to output gate
//   inputs      qkv [B, T, N], small [B, T, P], output gate [B, T, HV V] or none, convolution, A_log, dt_bias, o norm,
//               recurrent state, convolution's state
//   outputs     o [B, T, HV V], the states after the last token; attributes as above
// DecodeHead    RMSNorm and product: x [B, 1, D], norm [D], weight [D, vocab] -> [B, 1, vocab]; attribute eps
// AddNorm       x [B, T, D], what is added to it or none, norm [D] -> the sum, its RMSNorm; attribute eps
//
// Of a token's key and value projections only those of selected memories are read, and of the states only theirs.
//
// Build it in the artifact's folder:
//   g++ -std=c++17 -O3 -fopenmp-simd -shared -fPIC -I<ONNX Runtime>/include mom_cpu.cpp -o libmom_cpu_$(uname -m).so
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

// Compiled for several instruction sets, of which the loader picks the machine's. Other names of `arch` than these would
// fit that processor alone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t COLUMNS = 256;  // of a product, in one piece of work
constexpr int64_t ROWS = 4;       // sequences that share one pass over a weight
constexpr int64_t STEP = 4;       // features at a time
constexpr int64_t LINE = 16;      // values of a cache line
constexpr int64_t MAX_KEY_DIM = 256;
constexpr int64_t MAX_VALUE_DIM = 256;
constexpr int64_t BLOCK = 32;    // columns of a state that stay in the first cache while tokens pass
constexpr int64_t TOKENS = 512;  // of a sequence whose reads are held at once
constexpr float L2_EPS = 1e-6f;

size_t index(int64_t i) { return static_cast<size_t>(i); }

// ---- arithmetic ------------------------------------------------------------------------------------------------------

// 2^n r, n whole and |r| at most 2^(1/2); a loop over it becomes vector instructions, std::exp does not.
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

FOR_EACH_CPU float sum_of_squares(const float *x, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

FOR_EACH_CPU float dot(const float *x, const float *y, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
    return sum;
}

FOR_EACH_CPU void scale_by(float *y, const float *x, float factor, const float *weight, int64_t n) {
    if (weight) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
    }
}

void rms_norm(float *y, const float *x, const float *weight, int64_t n, float eps) {
    scale_by(y, x, 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps), weight, n);
}

FOR_EACH_CPU void silu_of(float *y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = silu(y[i]);
}

FOR_EACH_CPU void multiply_by_silu(float *y, const float *gate, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] *= silu(gate[i]);
}

FOR_EACH_CPU void add_scaled(float *y, const float *x, float factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

template <int R>
INLINE void product_of(const float *const *x, int64_t features, const float *w, int64_t stride, int64_t n,
                       float *const *y) {
    int64_t f = 0;
    for (; f + STEP <= features; f += STEP) {
        const float *w0 = w + f * stride, *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
        float a[R][STEP];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < STEP; ++i) a[r][i] = x[r][f + i];
        int64_t c = 0;
        for (; c + LINE <= n; c += LINE) {
            // The next features lie a stride away, which the processor does not foresee.
            for (int i = 0; i < STEP; ++i) __builtin_prefetch(w0 + (STEP + i) * stride + c);
            for (int r = 0; r < R; ++r) {
                float *__restrict out = y[r] + c;
#pragma omp simd
                for (int64_t j = 0; j < LINE; ++j)
                    out[j] += a[r][0] * w0[c + j] + a[r][1] * w1[c + j] + a[r][2] * w2[c + j] + a[r][3] * w3[c + j];
            }
        }
        for (; c < n; ++c)
            for (int r = 0; r < R; ++r) y[r][c] += a[r][0] * w0[c] + a[r][1] * w1[c] + a[r][2] * w2[c] + a[r][3] * w3[c];
    }
    for (; f < features; ++f)
        for (int r = 0; r < R; ++r) {
            const float a = x[r][f], *row = w + f * stride;
            float *__restrict out = y[r];
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) out[c] += a * row[c];
        }
}

// y[r][c] += sum_f x[r][f] w[f stride + c] for r < rows <= ROWS, c < n.
FOR_EACH_CPU void add_product(int64_t rows, const float *const *x, int64_t features, const float *w, int64_t stride,
                              int64_t n, float *const *y) {
    switch (rows) {
        case 1: return product_of<1>(x, features, w, stride, n, y);
        case 2: return product_of<2>(x, features, w, stride, n, y);
        case 3: return product_of<3>(x, features, w, stride, n, y);
        default: return product_of<4>(x, features, w, stride, n, y);
    }
}

// A channel's window [W - 1] and its input: the convolution's output, and the window behind it.
FOR_EACH_CPU void convolve(float *y, const float *x, const float *weight, const float *past, float *present, int64_t n,
                           int64_t width) {
    if (width == 4) {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
            const float p0 = past[3 * c], p1 = past[3 * c + 1], p2 = past[3 * c + 2], p3 = x[c];
            y[c] = weight[4 * c] * p0 + weight[4 * c + 1] * p1 + weight[4 * c + 2] * p2 + weight[4 * c + 3] * p3;
            present[3 * c] = p1, present[3 * c + 1] = p2, present[3 * c + 2] = p3;
        }
        return;
    }
    for (int64_t c = 0; c < n; ++c) {
        const float *w = weight + c * width, *window = past + c * (width - 1);
        float *next = present + c * (width - 1);
        float sum = w[width - 1] * x[c];
        for (int64_t i = 0; i + 1 < width; ++i) {
            sum += w[i] * window[i];
            next[i] = i + 2 < width ? window[i + 1] : x[c];
        }
        y[c] = sum;
    }
}

// read[v] = sum_k q[k] S[k, v], and with `remembered` the same of k.
FOR_EACH_CPU void read_state(const float *state, const float *q, const float *k, int64_t keys, int64_t values, float *read,
                             float *remembered) {
    std::fill(read, read + values, 0.0f);
    std::fill(remembered, remembered + values, 0.0f);
    int64_t i = 0;
    for (; i + STEP <= keys; i += STEP) {
        const float *s0 = state + i * values, *s1 = s0 + values, *s2 = s1 + values, *s3 = s2 + values;
        const float q0 = q[i], q1 = q[i + 1], q2 = q[i + 2], q3 = q[i + 3];
        const float k0 = k[i], k1 = k[i + 1], k2 = k[i + 2], k3 = k[i + 3];
#pragma omp simd
        for (int64_t v = 0; v < values; ++v) {
            read[v] += q0 * s0[v] + q1 * s1[v] + q2 * s2[v] + q3 * s3[v];
            remembered[v] += k0 * s0[v] + k1 * s1[v] + k2 * s2[v] + k3 * s3[v];
        }
    }
    for (; i < keys; ++i) {
        add_scaled(read, state + i * values, q[i], values);
        add_scaled(remembered, state + i * values, k[i], values);
    }
}

// S'[k, v] = decay S[k, v] + k[k] u[v]
FOR_EACH_CPU void write_state(float *present, const float *past, const float *k, const float *u, float decay, int64_t keys,
                              int64_t values) {
    for (int64_t i = 0; i < keys; ++i) {
        const float key = k[i], *from = past + i * values;
        float *to = present + i * values;
#pragma omp simd
        for (int64_t v = 0; v < values; ++v) to[v] = decay * from[v] + key * u[v];
    }
}

typedef float Vector __attribute__((vector_size(64)));

// S' = decay S + k u of a block of columns, and what the next token reads of it: q' S' and k' S'.
FOR_EACH_CPU void advance(float *state, float decay, const float *k, const float *u, const float *next_q,
                          const float *next_k, int64_t keys, float *read, float *remembered) {
    Vector *rows = reinterpret_cast<Vector *>(state);
    const Vector u0 = *reinterpret_cast<const Vector *>(u), u1 = *reinterpret_cast<const Vector *>(u + BLOCK / 2);
    Vector read0 = {}, read1 = {}, remembered0 = {}, remembered1 = {};
    for (int64_t i = 0; i < keys; ++i) {
        const Vector s0 = decay * rows[2 * i] + k[i] * u0, s1 = decay * rows[2 * i + 1] + k[i] * u1;
        rows[2 * i] = s0, rows[2 * i + 1] = s1;
        read0 += next_q[i] * s0, read1 += next_q[i] * s1;
        remembered0 += next_k[i] * s0, remembered1 += next_k[i] * s1;
    }
    Vector *to = reinterpret_cast<Vector *>(read), *also = reinterpret_cast<Vector *>(remembered);
    to[0] = read0, to[1] = read1, also[0] = remembered0, also[1] = remembered1;
}

// ---- work of several threads -----------------------------------------------------------------------------------------

// `uneven`: pieces of different lengths, which a thread takes one by one.
void parallel(const Ort::KernelContext &context, int64_t count, const std::function<void(int64_t)> &work,
              bool uneven = false) {
    const auto call = [](void *function, size_t index) {
        (*static_cast<const std::function<void(int64_t)> *>(function))(static_cast<int64_t>(index));
    };
    if (count == 1) return work(0);
    const auto pieces = static_cast<size_t>(std::max<int64_t>(count, 0));
    if (pieces) context.ParallelFor(call, pieces, uneven ? pieces : 0, const_cast<std::function<void(int64_t)> *>(&work));
}

// Products of rows with matrices, cut into pieces of COLUMNS columns.
class Products {
public:
    // y[i] = x[i] w, for all i; y[i] = start[i] + x[i] w with `start`.
    void add(const float *w, int64_t features, int64_t stride, int64_t columns, const std::vector<const float *> &x,
             const std::vector<float *> &y, const std::vector<const float *> &start = {}) {
        all_.push_back({w, features, stride, columns, x, y, start});
        if (!x.empty())
            for (int64_t c = 0; c < columns; c += COLUMNS) pieces_.push_back({all_.size() - 1, c});
    }

    int64_t pieces() const { return static_cast<int64_t>(pieces_.size()); }

    void run(int64_t piece) const {
        const Piece &own = pieces_[index(piece)];
        const Product &product = all_[own.product];
        const int64_t begin = own.begin;
        const int64_t n = std::min(COLUMNS, product.columns - begin), count = static_cast<int64_t>(product.x.size());
        for (int64_t r = 0; r < count; r += ROWS) {
            float *y[ROWS];
            const int64_t rows = std::min(ROWS, count - r);
            for (int64_t i = 0; i < rows; ++i) {
                y[i] = product.y[index(r + i)] + begin;
                if (product.start.empty())
                    std::fill(y[i], y[i] + n, 0.0f);
                else
                    std::copy_n(product.start[index(r + i)] + begin, n, y[i]);
            }
            add_product(rows, product.x.data() + r, product.features, product.w + begin, product.stride, n, y);
        }
    }

private:
    struct Product {
        const float *w;
        int64_t features, stride, columns;
        std::vector<const float *> x;
        std::vector<float *> y;
        std::vector<const float *> start;
    };
    struct Piece {
        size_t product;
        int64_t begin;
    };
    std::vector<Product> all_;
    std::vector<Piece> pieces_;
};

void run_all(const Ort::KernelContext &context, const Products &products) {
    parallel(context, products.pieces(), [&](int64_t piece) { products.run(piece); });
}

// [B][n] in one piece, and pointers to its rows.
struct Rows {
    Rows(int64_t batch, int64_t n) : values(index(batch * n)) {
        for (int64_t b = 0; b < batch; ++b) write.push_back(values.data() + b * n);
        read.assign(write.begin(), write.end());
    }
    Rows(const Rows &) = delete;
    float *operator[](int64_t b) { return write[index(b)]; }

    std::vector<float> values;
    std::vector<float *> write;
    std::vector<const float *> read;
};

std::vector<const float *> rows_of(const float *x, int64_t batch, int64_t n) {
    std::vector<const float *> rows;
    for (int64_t b = 0; b < batch; ++b) rows.push_back(x + b * n);
    return rows;
}

// ---- ONNX Runtime ----------------------------------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string &text) { throw Ort::Exception("mom: " + text, ORT_INVALID_ARGUMENT); }

struct Input {
    const float *data = nullptr;  // nullptr: not given
    std::vector<int64_t> shape;
};

Input input_at(const Ort::KernelContext &context, size_t index) {
    Input input;
    if (index >= context.GetInputCount()) return input;
    const Ort::ConstValue value = context.GetInput(index);
    if (!value) return input;
    input.shape = value.GetTensorTypeAndShapeInfo().GetShape();
    input.data = value.GetTensorData<float>();
    return input;
}

void check_shape(const char *name, const Input &input, const std::vector<int64_t> &shape) {
    if (input.data && input.shape == shape) return;
    const auto text = [](const std::vector<int64_t> &sizes) {
        std::string joined;
        for (const int64_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
        return "[" + joined + "]";
    };
    refuse(std::string(name) + " must be " + text(shape) + ", got " + (input.data ? text(input.shape) : "none") +
           "; pass tensors of this model and batch");
}

// What the operators with memories have in common.
struct Attributes {
    explicit Attributes(const OrtKernelInfo *raw) {
        const Ort::ConstKernelInfo info{raw};
        heads = info.GetAttribute<int64_t>("heads");
        value_heads = info.GetAttribute<int64_t>("value_heads");
        memories = info.GetAttribute<int64_t>("memories");
        topk = info.GetAttribute<int64_t>("topk");
        shared = info.GetAttribute<int64_t>("shared");
        eps = info.GetAttribute<float>("eps");
        scale = info.GetAttribute<float>("scale");
        const auto rule = info.GetAttribute<std::string>("rule");
        delta = rule == "delta" || rule == "gated_delta";
        gated = rule == "mamba2" || rule == "gated_delta";
        retention = rule == "retention";
        scales_values = rule == "mamba2";
        if (!delta && !gated && !retention && rule != "linear") refuse("rule must be known to this library, got " + rule);
        if (heads < 1 || value_heads % heads) refuse("value_heads must be a multiple of heads");
        if (topk < 1 || topk > memories)
            refuse("topk must lie in [1, memories], got " + std::to_string(topk) + " of " + std::to_string(memories));
    }

    int64_t heads, value_heads, memories, topk, shared;
    float eps, scale;
    bool delta, gated, retention, scales_values;
};

// The memories of a layer while tokens pass.
struct Memories {
    Memories(const Attributes &attributes, const Input &convolution_, const Input &a_log_, const Input &dt_bias_,
             const Input &o_norm_, const Input &recurrent, const Input &conv_state, int64_t batch_, int64_t projected,
             int64_t products)
        : op(attributes), convolution(convolution_), a_log(a_log_), dt_bias(dt_bias_), o_norm(o_norm_), past(recurrent),
          past_window(conv_state), batch(batch_) {
        if (past.shape.size() != 4) refuse("the recurrent state must be [B, M' HV, K, V]");
        total = op.memories + op.shared, selected = op.topk + op.shared;
        key_dim = past.shape[2], value_dim = past.shape[3];
        keys = op.heads * key_dim, values = op.value_heads * value_dim, channels = 2 * keys + values;
        if (key_dim > MAX_KEY_DIM || value_dim > MAX_VALUE_DIM) refuse("K and V must be at most 256");
        groups = projected == channels ? 1 : total;
        row = keys + groups * (keys + values);
        small = op.memories + groups * op.value_heads * (op.delta + op.gated);
        check_columns("qkv", projected, row);
        check_columns("small", products, small);
        width = convolution.data && convolution.shape.size() == 2 ? convolution.shape[1] : 1;
        if (convolution.data) {
            check_shape("the convolution", convolution, {channels, width});
            check_shape("the convolution's state", past_window, {batch, total * channels, width - 1});
        }
        if (op.gated) {
            check_shape("A_log", a_log, {op.value_heads});
            check_shape("dt_bias", dt_bias, {op.value_heads});
        }
        check_shape("the o norm", o_norm, {value_dim});
        check_shape("the recurrent state", past, {batch, total * op.value_heads, key_dim, value_dim});
    }

    static void check_columns(const char *name, int64_t found, int64_t wanted) {
        if (found != wanted)
            refuse(std::string(name) + " must have " + std::to_string(wanted) + " columns, got " + std::to_string(found) +
                   "; export again");
    }

    void write_to(const Ort::KernelContext &context) {
        state = context.GetOutput(1, past.shape).GetTensorMutableData<float>();
        window = convolution.data ? context.GetOutput(2, past_window.shape).GetTensorMutableData<float>() : nullptr;
    }

    bool in_place() const { return state == past.data && (!window || window == past_window.data); }

    // A token's memories and their weights, the shared one last; among equals the lowest index.
    void route(const float *logits, int64_t *memory, float *weight) const {
        for (int64_t j = 0; j < op.topk; ++j) {
            int64_t best = -1;
            for (int64_t m = 0; m < op.memories; ++m)
                if (std::find(memory, memory + j, m) == memory + j && (best < 0 || logits[m] > logits[best])) best = m;
            memory[j] = best;
        }
        float sum = 0.0f;
        for (int64_t j = 0; j < op.topk; ++j) sum += weight[j] = std::exp(logits[memory[j]] - logits[memory[0]]);
        for (int64_t j = 0; j < op.topk; ++j) weight[j] /= sum;
        if (op.shared) memory[op.topk] = op.memories, weight[op.topk] = 1.0f;
    }

    int64_t group_of(int64_t memory) const { return groups == 1 ? 0 : memory; }

    int64_t values_of_head() const { return op.value_heads / op.heads * value_dim; }

    // q, k and v of key head h behind convolution, SiLU and norm: [K], [K] and [HV / H, V]. The window moves on from
    // `from` to this memory's own.
    void gather(int64_t at, int64_t memory, int64_t head, const float *projected, const float *from, float *q, float *k,
                float *v) const {
        const float *kv = projected + keys + group_of(memory) * (keys + values);
        const int64_t n = values_of_head();
        convolve_part(q, projected + head * key_dim, head * key_dim, key_dim, at, from);
        convolve_part(k, kv + head * key_dim, keys + head * key_dim, key_dim, at, from);
        convolve_part(v, kv + keys + head * n, 2 * keys + head * n, n, at, from);
        for (float *part : {q, k}) {
            silu_of(part, key_dim);
            scale_by(part, part, 1.0f / std::sqrt(sum_of_squares(part, key_dim) + L2_EPS), nullptr, key_dim);
        }
        silu_of(v, n);
    }

    struct Gates {
        float decay, beta;
    };

    // Of a value head; v [V] is multiplied by dt where the rule wants it.
    Gates gates(int64_t memory, int64_t value_head, const float *products, float *v) const {
        const int64_t gate = group_of(memory) * op.value_heads + value_head;
        Gates found{1.0f, 1.0f};
        if (op.retention) found.decay = 1.0f - std::exp2(static_cast<float>(-5 - value_head));
        if (op.gated) {
            const float *a = products + op.memories + (op.delta ? groups * op.value_heads : 0);
            const float dt = softplus(a[gate] + dt_bias.data[value_head]);
            found.decay = std::exp(-std::exp(a_log.data[value_head]) * dt);
            if (op.scales_values) scale_by(v, v, dt, nullptr, value_dim);
        }
        if (op.delta) found.beta = 1.0f / (1.0f + std::exp(-products[op.memories + gate]));
        return found;
    }

    // One token, row b, key head h: the rule of its value heads, whose outputs go to o [HV V].
    void remember(int64_t b, int64_t memory, int64_t head, const float *projected, const float *products, float *o) const {
        const int64_t at = b * total + memory, each = op.value_heads / op.heads;
        std::vector<float> qkv(index(2 * key_dim + values_of_head()));
        float *q = qkv.data(), *k = q + key_dim, *v = k + key_dim;
        gather(at, memory, head, projected, past_window.data, q, k, v);
        const float product = dot(q, k, key_dim);
        for (int64_t value_head = head * each; value_head < (head + 1) * each; ++value_head, v += value_dim) {
            const Gates gate = gates(memory, value_head, products, v);
            const int64_t begin = (at * op.value_heads + value_head) * key_dim * value_dim;
            float read[MAX_VALUE_DIM], known[MAX_VALUE_DIM];
            read_state(past.data + begin, q, k, key_dim, value_dim, read, known);
            if (op.delta) {
                scale_by(v, v, gate.beta, nullptr, value_dim);
                add_scaled(v, known, -gate.beta * gate.decay, value_dim);
            }
            float *out = o + value_head * value_dim;
            scale_by(out, read, op.scale * gate.decay, nullptr, value_dim);
            add_scaled(out, v, op.scale * product, value_dim);
            write_state(state + begin, past.data + begin, k, v, gate.decay, key_dim, value_dim);
        }
    }

    // Tokens of row b that selected a memory, one after the other, key head h; `first`: from the past state, else from
    // what earlier tokens left. projected(i), products(i) and o(i) are rows of token i.
    template <class Projected, class ProductsOf, class Out>
    void scan(int64_t b, int64_t memory, int64_t head, int64_t count, bool first, const Projected &projected,
              const ProductsOf &products, const Out &o) const {
        const int64_t at = b * total + memory, each = op.value_heads / op.heads, n = values_of_head();
        std::vector<float> q(index(count * key_dim)), k(q.size()), v(index(count * n));
        std::vector<float> product(index(count));
        for (int64_t i = 0; i < count; ++i) {
            const bool before = first && i == 0;
            float *own_q = q.data() + i * key_dim, *own_k = k.data() + i * key_dim;
            gather(at, memory, head, projected(i), before ? past_window.data : window, own_q, own_k, v.data() + i * n);
            product[index(i)] = dot(own_q, own_k, key_dim);
        }
        std::vector<Gates> gate(index(count));
        for (int64_t value_head = head * each; value_head < (head + 1) * each; ++value_head) {
            float *own_v = v.data() + (value_head - head * each) * value_dim;
            for (int64_t i = 0; i < count; ++i) gate[index(i)] = gates(memory, value_head, products(i), own_v + i * n);
            const int64_t begin = (at * op.value_heads + value_head) * key_dim * value_dim;
            const float *from = (first ? past.data : state) + begin;
            for (int64_t c = 0; c < value_dim; c += BLOCK) {
                const int64_t columns = std::min(BLOCK, value_dim - c);
                alignas(64) float block[MAX_KEY_DIM * BLOCK] = {}, u[BLOCK] = {}, read[BLOCK], known[BLOCK];
                for (int64_t i = 0; i < key_dim; ++i) std::copy_n(from + i * value_dim + c, columns, block + i * BLOCK);
                if (count) advance(block, 1.0f, k.data(), u, q.data(), k.data(), key_dim, read, known);
                for (int64_t i = 0; i < count; ++i) {
                    const auto [decay, beta] = gate[index(i)];
                    const float *value = own_v + i * n + c, known_share = op.delta ? beta * decay : 0.0f;
                    float *out = o(i) + value_head * value_dim + c;
                    for (int64_t j = 0; j < columns; ++j) {
                        u[j] = beta * value[j] - known_share * known[j];
                        out[j] = op.scale * (decay * read[j] + product[index(i)] * u[j]);
                    }
                    const int64_t next = std::min(i + 1, count - 1) * key_dim;  // of the last token nobody reads
                    advance(block, decay, k.data() + i * key_dim, u, q.data() + next, k.data() + next, key_dim, read,
                            known);
                }
                for (int64_t i = 0; i < key_dim; ++i)
                    std::copy_n(block + i * BLOCK, columns, state + begin + i * value_dim + c);
            }
        }
    }

    // The sum of what the memories gave by their weights, the norm of each head, and the output gate [HV V].
    void combine(const float *const *read, const float *weight, const float *gate, float *o) const {
        std::fill(o, o + values, 0.0f);
        for (int64_t j = 0; j < selected; ++j) add_scaled(o, read[j], weight[j], values);
        for (float *head = o; head < o + values; head += value_dim) rms_norm(head, head, o_norm.data, value_dim, op.eps);
        if (gate) multiply_by_silu(o, gate, values);
    }

    // What a memory that row b leaves alone holds.
    void keep(int64_t b, int64_t memory) const {
        const int64_t at = b * total + memory, size = op.value_heads * key_dim * value_dim, other = channels * (width - 1);
        if (state != past.data) std::copy_n(past.data + at * size, size, state + at * size);
        if (window && window != past_window.data)
            std::copy_n(past_window.data + at * other, other, window + at * other);
    }

    const Attributes &op;
    const Input &convolution, &a_log, &dt_bias, &o_norm, &past, &past_window;
    int64_t batch, total, selected, key_dim, value_dim, keys, values, channels, groups, row, width, small;
    float *state = nullptr, *window = nullptr;

private:
    void convolve_part(float *y, const float *x, int64_t channel, int64_t n, int64_t at, const float *from) const {
        if (!window) {
            std::copy_n(x, n, y);
            return;
        }
        const int64_t begin = (at * channels + channel) * (width - 1);
        convolve(y, x, convolution.data + channel * width, from + begin, window + begin, n, width);
    }
};

// What an operator does with the runtime's errors.
template <class Self>
struct Computes {
    OrtStatusPtr ComputeV2(OrtKernelContext *raw) {
        try {
            static_cast<const Self *>(this)->compute(Ort::KernelContext(raw));
            return nullptr;
        } catch (const Ort::Exception &error) {
            return Ort::Status(error).release();
        } catch (const std::exception &error) {
            return Ort::Status(error.what(), ORT_FAIL).release();
        }
    }
};

enum : size_t {
    X, ATTENTION_NORM, SMALL, QKV, OUTPUT_GATE, CONVOLUTION, A_LOG, DT_BIAS, O_NORM, O, MLP_NORM, GATE, UP, DOWN,
    RECURRENT_STATE, CONV_STATE, INPUTS
};

struct LayerKernel : Computes<LayerKernel> {
    LayerKernel(const OrtApi &, const OrtKernelInfo *info) : op(info) {}

    void compute(const Ort::KernelContext &context) const {
        Input in[INPUTS];
        for (size_t i = 0; i < INPUTS; ++i) in[i] = input_at(context, i);
        for (const size_t i : {SMALL, QKV, GATE})
            if (in[i].shape.size() != 2) refuse("weights must be [D, outputs]");
        if (in[X].shape.size() != 3) refuse("x must be [B, 1, D]");
        const int64_t batch = in[X].shape[0], hidden = in[X].shape[2], mlp = in[GATE].shape[1];
        Memories s(op, in[CONVOLUTION], in[A_LOG], in[DT_BIAS], in[O_NORM], in[RECURRENT_STATE], in[CONV_STATE], batch,
                   in[QKV].shape[1], in[SMALL].shape[1]);
        check_shape("x", in[X], {batch, 1, hidden});
        check_shape("the attention norm", in[ATTENTION_NORM], {hidden});
        check_shape("small", in[SMALL], {hidden, s.small});
        check_shape("qkv", in[QKV], {hidden, s.row});
        if (in[OUTPUT_GATE].data) check_shape("the output gate", in[OUTPUT_GATE], {hidden, s.values});
        check_shape("o", in[O], {s.values, hidden});
        check_shape("the MLP norm", in[MLP_NORM], {hidden});
        check_shape("gate", in[GATE], {hidden, mlp});
        check_shape("up", in[UP], {hidden, mlp});
        check_shape("down", in[DOWN], {mlp, hidden});
        float *y = context.GetOutput(0, in[X].shape).GetTensorMutableData<float>();
        s.write_to(context);

        const std::vector<const float *> x = rows_of(in[X].data, batch, hidden);
        Rows normed(batch, hidden), products(batch, s.small);
        for (int64_t b = 0; b < batch; ++b) rms_norm(normed[b], x[index(b)], in[ATTENTION_NORM].data, hidden, op.eps);
        Products first;
        first.add(in[SMALL].data, hidden, s.small, s.small, normed.read, products.write);
        run_all(context, first);
        std::vector<int64_t> memory(index(batch * s.selected));
        std::vector<float> weight(memory.size());
        for (int64_t b = 0; b < batch; ++b)
            s.route(products[b], memory.data() + b * s.selected, weight.data() + b * s.selected);

        const int64_t part = s.keys + s.values;
        Rows projected(batch, s.row), gate(in[OUTPUT_GATE].data ? batch : 0, s.values);
        Products second;
        second.add(in[QKV].data, hidden, s.row, s.keys, normed.read, projected.write);
        for (int64_t group = 0; group < s.groups; ++group) {
            std::vector<const float *> readers;
            std::vector<float *> targets;
            for (int64_t b = 0; b < batch; ++b) {
                const int64_t *chosen = memory.data() + b * s.selected;
                if (std::any_of(chosen, chosen + s.selected, [&](int64_t m) { return s.group_of(m) == group; })) {
                    readers.push_back(normed.read[index(b)]);
                    targets.push_back(projected[b] + s.keys + group * part);
                }
            }
            second.add(in[QKV].data + s.keys + group * part, hidden, s.row, part, readers, targets);
        }
        if (in[OUTPUT_GATE].data) second.add(in[OUTPUT_GATE].data, hidden, s.values, s.values, normed.read, gate.write);
        run_all(context, second);

        Rows read(batch * s.selected, s.values), o(batch, s.values);
        const int64_t rules = batch * s.selected * op.heads;
        parallel(context, rules + (s.in_place() ? 0 : batch * s.total), [&](int64_t i) {
            if (i < rules) {
                const int64_t slot = i / op.heads, b = slot / s.selected;
                s.remember(b, memory[index(slot)], i % op.heads, projected[b], products[b], read[slot]);
                return;
            }
            const int64_t b = (i - rules) / s.total, m = (i - rules) % s.total, *chosen = memory.data() + b * s.selected;
            if (std::find(chosen, chosen + s.selected, m) == chosen + s.selected) s.keep(b, m);
        });
        for (int64_t b = 0; b < batch; ++b)
            s.combine(read.read.data() + b * s.selected, weight.data() + b * s.selected,
                      in[OUTPUT_GATE].data ? gate[b] : nullptr, o[b]);

        Rows middle(batch, hidden), left(batch, mlp), right(batch, mlp);
        Products third;
        third.add(in[O].data, s.values, hidden, hidden, o.read, middle.write, x);
        run_all(context, third);
        for (int64_t b = 0; b < batch; ++b) rms_norm(normed[b], middle[b], in[MLP_NORM].data, hidden, op.eps);
        Products gates, ups, last;
        gates.add(in[GATE].data, hidden, mlp, mlp, normed.read, left.write);
        ups.add(in[UP].data, hidden, mlp, mlp, normed.read, right.write);
        parallel(context, gates.pieces(), [&](int64_t piece) {
            gates.run(piece), ups.run(piece);
            const int64_t begin = piece * COLUMNS, n = std::min(COLUMNS, mlp - begin);
            for (int64_t b = 0; b < batch; ++b) multiply_by_silu(right[b] + begin, left[b] + begin, n);
        });
        std::vector<float *> out;
        for (int64_t b = 0; b < batch; ++b) out.push_back(y + b * hidden);
        last.add(in[DOWN].data, mlp, hidden, hidden, right.read, out, middle.read);
        run_all(context, last);
    }

    Attributes op;
};

struct MemoriesKernel : Computes<MemoriesKernel> {
    MemoriesKernel(const OrtApi &, const OrtKernelInfo *info) : op(info) {}

    void compute(const Ort::KernelContext &context) const {
        Input in[9];
        for (size_t i = 0; i < 9; ++i) in[i] = input_at(context, i);
        const Input &qkv = in[0], &small = in[1], &gate = in[2];
        if (qkv.shape.size() != 3 || small.shape.size() != 3) refuse("qkv must be [B, T, N] and small [B, T, P]");
        const int64_t batch = qkv.shape[0], length = qkv.shape[1];
        Memories s(op, in[3], in[4], in[5], in[6], in[7], in[8], batch, qkv.shape[2], small.shape[2]);
        check_shape("small", small, {batch, length, s.small});
        if (gate.data) check_shape("the output gate", gate, {batch, length, s.values});
        float *o = context.GetOutput(0, {batch, length, s.values}).GetTensorMutableData<float>();
        s.write_to(context);

        const int64_t most = std::min(TOKENS, length);
        Rows read(batch * most * s.selected, s.values);
        std::vector<int64_t> memory(index(batch * most * s.selected));
        std::vector<float> weight(memory.size());
        std::vector<char> seen(index(batch * s.total));
        std::vector<std::vector<int64_t>> slots(seen.size());  // of the tokens that selected a memory, in order
        for (int64_t start = 0; start < length; start += TOKENS) {
            const int64_t count = std::min(TOKENS, length - start);
            for (auto &list : slots) list.clear();
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t t = 0; t < count; ++t) {
                    const int64_t slot = (b * count + t) * s.selected;
                    s.route(small.data + (b * length + start + t) * s.small, memory.data() + slot, weight.data() + slot);
                    for (int64_t j = slot; j < slot + s.selected; ++j)
                        slots[index(b * s.total + memory[index(j)])].push_back(j);
                }
            const auto token = [&](int64_t slot) {  // among all tokens
                const int64_t b = slot / s.selected / count;
                return b * length + start + slot / s.selected % count;
            };
            // A head's memories have different lengths.
            parallel(context, batch * s.total * op.heads, [&](int64_t i) {
                const int64_t at = i % (batch * s.total);
                const std::vector<int64_t> &own = slots[index(at)];
                if (own.empty()) return;
                const auto mine = static_cast<int64_t>(own.size());
                s.scan(at / s.total, at % s.total, i / (batch * s.total), mine, !seen[index(at)],
                       [&](int64_t n) { return qkv.data + token(own[index(n)]) * s.row; },
                       [&](int64_t n) { return small.data + token(own[index(n)]) * s.small; },
                       [&](int64_t n) { return read[own[index(n)]]; });
            }, true);
            for (size_t i = 0; i < seen.size(); ++i) seen[i] |= !slots[i].empty();
            parallel(context, batch * count, [&](int64_t i) {
                const int64_t all = token(i * s.selected);
                s.combine(read.read.data() + i * s.selected, weight.data() + i * s.selected,
                          gate.data ? gate.data + all * s.values : nullptr, o + all * s.values);
            });
        }
        for (int64_t i = 0; i < batch * s.total; ++i)
            if (!seen[index(i)]) s.keep(i / s.total, i % s.total);
    }

    Attributes op;
};

struct AddNormKernel : Computes<AddNormKernel> {
    AddNormKernel(const OrtApi &, const OrtKernelInfo *raw) : eps(Ort::ConstKernelInfo{raw}.GetAttribute<float>("eps")) {}

    void compute(const Ort::KernelContext &context) const {
        const Input x = input_at(context, 0), added = input_at(context, 1), norm = input_at(context, 2);
        if (x.shape.size() != 3) refuse("x must be [B, T, D]");
        const int64_t hidden = x.shape[2];
        if (added.data) check_shape("what is added to x", added, x.shape);
        check_shape("the norm", norm, {hidden});
        float *sum = context.GetOutput(0, x.shape).GetTensorMutableData<float>();
        float *normed = context.GetOutput(1, x.shape).GetTensorMutableData<float>();
        parallel(context, x.shape[0] * x.shape[1], [&](int64_t row) {
            const int64_t at = row * hidden;
            std::copy_n(x.data + at, hidden, sum + at);
            if (added.data) add_scaled(sum + at, added.data + at, 1.0f, hidden);
            rms_norm(normed + at, sum + at, norm.data, hidden, eps);
        });
    }

    float eps;
};

struct HeadKernel : Computes<HeadKernel> {
    HeadKernel(const OrtApi &, const OrtKernelInfo *raw) : eps(Ort::ConstKernelInfo{raw}.GetAttribute<float>("eps")) {}

    void compute(const Ort::KernelContext &context) const {
        const Input x = input_at(context, 0), norm = input_at(context, 1), weight = input_at(context, 2);
        if (x.shape.size() != 3 || weight.shape.size() != 2) refuse("x must be [B, 1, D] and the weight [D, vocab]");
        const int64_t batch = x.shape[0], hidden = x.shape[2], vocab = weight.shape[1];
        check_shape("x", x, {batch, 1, hidden});
        check_shape("the norm", norm, {hidden});
        check_shape("the head", weight, {hidden, vocab});
        float *logits = context.GetOutput(0, {batch, 1, vocab}).GetTensorMutableData<float>();
        Rows normed(batch, hidden);
        std::vector<float *> out;
        for (int64_t b = 0; b < batch; ++b) {
            rms_norm(normed[b], x.data + b * hidden, norm.data, hidden, eps);
            out.push_back(logits + b * vocab);
        }
        Products products;
        products.add(weight.data, hidden, vocab, vocab, normed.read, out);
        run_all(context, products);
    }

    float eps;
};

template <class Self, class Kernel>
struct Operator : Ort::CustomOpBase<Self, Kernel, true> {
    OrtStatusPtr CreateKernelV2(const OrtApi &api, const OrtKernelInfo *info, void **kernel) const {
        try {
            *kernel = new Kernel(api, info);
            return nullptr;
        } catch (const Ort::Exception &error) {
            return Ort::Status(error).release();
        }
    }
    const char *GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

struct DecodeLayer : Operator<DecodeLayer, LayerKernel> {
    const char *GetName() const { return "DecodeLayer"; }
    size_t GetInputTypeCount() const { return INPUTS; }
    size_t GetOutputTypeCount() const { return 3; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        const bool optional = i == OUTPUT_GATE || i == CONVOLUTION || i == A_LOG || i == DT_BIAS || i == CONV_STATE;
        return optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const {
        return i == 2 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
};

struct MemoriesOperator : Operator<MemoriesOperator, MemoriesKernel> {
    const char *GetName() const { return "Memories"; }
    size_t GetInputTypeCount() const { return 9; }
    size_t GetOutputTypeCount() const { return 3; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return (i >= 2 && i <= 5) || i == 8 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const {
        return i == 2 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
};

struct AddNorm : Operator<AddNorm, AddNormKernel> {
    const char *GetName() const { return "AddNorm"; }
    size_t GetInputTypeCount() const { return 3; }
    size_t GetOutputTypeCount() const { return 2; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i == 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
};

struct DecodeHead : Operator<DecodeHead, HeadKernel> {
    const char *GetName() const { return "DecodeHead"; }
    size_t GetInputTypeCount() const { return 3; }
    size_t GetOutputTypeCount() const { return 1; }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                                const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (!api)
        return base->GetApi(1)->CreateStatus(ORT_FAIL, "mom: libmom_cpu must be built with the headers of this ONNX "
                                                       "Runtime or an older one");
    Ort::InitApi(api);
    static std::mutex mutex;
    static const DecodeLayer layer;
    static const MemoriesOperator memories;
    static const AddNorm norm;
    static const DecodeHead head;
    static Ort::CustomOpDomain domain{"mom"};
    static bool added = false;
    try {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!added) {
            domain.Add(&layer);
            domain.Add(&memories);
            domain.Add(&norm);
            domain.Add(&head);
            added = true;
        }
        Ort::UnownedSessionOptions(options).Add(domain);
    } catch (const Ort::Exception &error) {
        return Ort::Status(error).release();
    }
    return nullptr;
}
