// A decode step of a MoM model as operators of ONNX Runtime for the CPU: domain "mom", float32.
//
// DecodeLayer   a block for one token of each sequence: norm, routing, convolution, rule, output norm and gate, MLP
//   inputs      x [B, 1, D], attention norm [D], small [D, P] (router, then b and a of the rule), qkv [D, H K + G (H K +
//               HV V)], output gate [D, HV V] or none, convolution [C, W] or none, A_log and dt_bias [HV] or none,
//               o norm [V], o [HV V, D], MLP norm [D], gate and up [D, F], down [F, D],
//               recurrent state [B, M' HV, K, V], convolution's state [B, M' C, W - 1] or none
//   outputs     x [B, 1, D], the states after the token; a state that has the memory of the past one is changed in place
//   attributes  heads, value_heads, memories, topk, shared, rule, eps, scale
// DecodeHead    RMSNorm and product: x [B, 1, D], norm [D], weight [D, vocab] -> [B, 1, vocab]; attribute eps
//
// Of the key and value projections only those of selected memories are read, and of the states only theirs.
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
constexpr int64_t MAX_VALUE_DIM = 256;
constexpr float L2_EPS = 1e-6f;

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

// y = silu(y) * x, or silu(y) without x.
FOR_EACH_CPU void gate_with(float *y, const float *x, int64_t n) {
    if (x) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) y[i] = silu(y[i]) * x[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) y[i] = silu(y[i]);
    }
}

FOR_EACH_CPU void add_scaled(float *y, const float *x, float factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

template <int R>
INLINE void product_of(const float *const *x, int64_t features, const float *w, int64_t stride, int64_t n, float *const *y) {
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
FOR_EACH_CPU void add_product(int64_t rows, const float *const *x, int64_t features, const float *w, int64_t stride, int64_t n,
                              float *const *y) {
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

// ---- work of several threads -----------------------------------------------------------------------------------------

void parallel(const Ort::KernelContext &context, int64_t count, const std::function<void(int64_t)> &work) {
    const auto call = [](void *function, size_t index) {
        (*static_cast<const std::function<void(int64_t)> *>(function))(static_cast<int64_t>(index));
    };
    if (count == 1) return work(0);
    if (count > 0)
        context.ParallelFor(call, static_cast<size_t>(count), 0, const_cast<std::function<void(int64_t)> *>(&work));
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
        const auto [index, begin] = pieces_[static_cast<size_t>(piece)];
        const Product &product = all_[index];
        const int64_t n = std::min(COLUMNS, product.columns - begin), count = static_cast<int64_t>(product.x.size());
        for (int64_t r = 0; r < count; r += ROWS) {
            float *y[ROWS];
            const int64_t rows = std::min(ROWS, count - r);
            for (int64_t i = 0; i < rows; ++i) {
                y[i] = product.y[static_cast<size_t>(r + i)] + begin;
                if (product.start.empty())
                    std::fill(y[i], y[i] + n, 0.0f);
                else
                    std::copy_n(product.start[static_cast<size_t>(r + i)] + begin, n, y[i]);
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
    Rows(int64_t batch, int64_t n) : size(n), values(static_cast<size_t>(batch * n)) {
        for (int64_t b = 0; b < batch; ++b) write.push_back(values.data() + b * n);
        read.assign(write.begin(), write.end());
    }
    Rows(const Rows &) = delete;
    float *operator[](int64_t b) { return write[static_cast<size_t>(b)]; }

    int64_t size;
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

enum : size_t {
    X, ATTENTION_NORM, SMALL, QKV, OUTPUT_GATE, CONVOLUTION, A_LOG, DT_BIAS, O_NORM, O, MLP_NORM, GATE, UP, DOWN, RECURRENT_STATE,
    CONV_STATE, INPUTS
};

struct LayerKernel {
    LayerKernel(const OrtApi &, const OrtKernelInfo *raw) {
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

    OrtStatusPtr ComputeV2(OrtKernelContext *raw) {
        try {
            compute(Ort::KernelContext(raw));
            return nullptr;
        } catch (const Ort::Exception &error) {
            return Ort::Status(error).release();
        } catch (const std::exception &error) {
            return Ort::Status(error.what(), ORT_FAIL).release();
        }
    }

    int64_t heads, value_heads, memories, topk, shared;
    float eps, scale;
    bool delta, gated, retention, scales_values;

private:
    void compute(const Ort::KernelContext &context) const;
};

// One call: what it reads and what it makes.
struct Step {
    Step(const LayerKernel &kernel, const Ort::KernelContext &context) : op(kernel) {
        for (size_t i = 0; i < INPUTS; ++i) in[i] = input_at(context, i);
        if (in[X].shape.size() != 3 || in[RECURRENT_STATE].shape.size() != 4 || in[QKV].shape.size() != 2 ||
            in[GATE].shape.size() != 2)
            refuse("x must be [B, 1, D] and the recurrent state [B, M' HV, K, V]");
        batch = in[X].shape[0], hidden = in[X].shape[2], mlp = in[GATE].shape[1];
        total = op.memories + op.shared, selected = op.topk + op.shared;
        key_dim = in[RECURRENT_STATE].shape[2], value_dim = in[RECURRENT_STATE].shape[3];
        keys = op.heads * key_dim, values = op.value_heads * value_dim, channels = 2 * keys + values;
        if (value_dim > MAX_VALUE_DIM) refuse("V must be at most 256");
        groups = in[QKV].shape[1] == 2 * keys + values ? 1 : total;
        width = in[CONVOLUTION].data && in[CONVOLUTION].shape.size() == 2 ? in[CONVOLUTION].shape[1] : 1;
        check_shape("x", in[X], {batch, 1, hidden});
        check_shape("the attention norm", in[ATTENTION_NORM], {hidden});
        small = op.memories + groups * op.value_heads * (op.delta + op.gated);
        check_shape("small", in[SMALL], {hidden, small});
        check_shape("qkv", in[QKV], {hidden, keys + groups * (keys + values)});
        if (in[OUTPUT_GATE].data) check_shape("the output gate", in[OUTPUT_GATE], {hidden, values});
        if (in[CONVOLUTION].data) {
            check_shape("the convolution", in[CONVOLUTION], {channels, width});
            check_shape("the convolution's state", in[CONV_STATE], {batch, total * channels, width - 1});
        }
        if (op.gated) {
            check_shape("A_log", in[A_LOG], {op.value_heads});
            check_shape("dt_bias", in[DT_BIAS], {op.value_heads});
        }
        check_shape("the o norm", in[O_NORM], {value_dim});
        check_shape("o", in[O], {values, hidden});
        check_shape("the MLP norm", in[MLP_NORM], {hidden});
        check_shape("gate", in[GATE], {hidden, mlp});
        check_shape("up", in[UP], {hidden, mlp});
        check_shape("down", in[DOWN], {mlp, hidden});
        check_shape("the recurrent state", in[RECURRENT_STATE], {batch, total * op.value_heads, key_dim, value_dim});
        y = output(context, 0, in[X]);
        state = output(context, 1, in[RECURRENT_STATE]);
        window = in[CONVOLUTION].data ? output(context, 2, in[CONV_STATE]) : nullptr;
    }

    static float *output(const Ort::KernelContext &context, size_t index, const Input &like) {
        return context.GetOutput(index, like.shape).GetTensorMutableData<float>();
    }

    // The memories of row b and their weights, the shared one last; among equals the lowest index.
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

    // Row b, memory m, key head h: the convolution and the rule of its value heads, whose outputs go to o [HV V].
    void remember(int64_t b, int64_t memory, int64_t head, const float *projected, const float *products, float *o) const {
        const int64_t group = group_of(memory), each = op.value_heads / op.heads, at = b * total + memory;
        const float *kv = projected + keys + group * (keys + values);
        std::vector<float> qkv(static_cast<size_t>(2 * key_dim + each * value_dim));
        float *q = qkv.data(), *k = q + key_dim, *v = k + key_dim;
        convolve_part(q, projected + head * key_dim, head * key_dim, key_dim, at);
        convolve_part(k, kv + head * key_dim, keys + head * key_dim, key_dim, at);
        convolve_part(v, kv + keys + head * each * value_dim, 2 * keys + head * each * value_dim, each * value_dim, at);
        gate_with(q, nullptr, 2 * key_dim + each * value_dim);
        for (float *unit : {q, k})
            scale_by(unit, unit, 1.0f / std::sqrt(sum_of_squares(unit, key_dim) + L2_EPS), nullptr, key_dim);
        const float product = dot(q, k, key_dim);
        for (int64_t i = 0; i < each; ++i, v += value_dim) {
            const int64_t value_head = head * each + i, gate = group * op.value_heads + value_head;
            float decay = 1.0f;
            if (op.retention) decay = 1.0f - std::exp2(static_cast<float>(-5 - value_head));
            if (op.gated) {
                const float *a = products + op.memories + (op.delta ? groups * op.value_heads : 0);
                const float dt = softplus(a[gate] + in[DT_BIAS].data[value_head]);
                decay = std::exp(-std::exp(in[A_LOG].data[value_head]) * dt);
                if (op.scales_values) scale_by(v, v, dt, nullptr, value_dim);
            }
            const int64_t begin = (at * op.value_heads + value_head) * key_dim * value_dim;
            const float *past = in[RECURRENT_STATE].data + begin;
            float read[MAX_VALUE_DIM], known[MAX_VALUE_DIM];
            read_state(past, q, k, key_dim, value_dim, read, known);
            if (op.delta) {
                const float beta = 1.0f / (1.0f + std::exp(-products[op.memories + gate]));
                scale_by(v, v, beta, nullptr, value_dim);
                add_scaled(v, known, -beta * decay, value_dim);
            }
            float *out = o + value_head * value_dim;
            scale_by(out, read, op.scale * decay, nullptr, value_dim);
            add_scaled(out, v, op.scale * product, value_dim);
            write_state(state + begin, past, k, v, decay, key_dim, value_dim);
        }
    }

    void convolve_part(float *y, const float *x, int64_t channel, int64_t n, int64_t at) const {
        if (!window) {
            std::copy_n(x, n, y);
            return;
        }
        const int64_t begin = (at * channels + channel) * (width - 1);
        convolve(y, x, in[CONVOLUTION].data + channel * width, in[CONV_STATE].data + begin, window + begin, n, width);
    }

    // What a memory that row b leaves alone holds.
    void keep(int64_t b, int64_t memory) const {
        const int64_t at = b * total + memory, size = op.value_heads * key_dim * value_dim, other = channels * (width - 1);
        if (state != in[RECURRENT_STATE].data) std::copy_n(in[RECURRENT_STATE].data + at * size, size, state + at * size);
        if (window && window != in[CONV_STATE].data) std::copy_n(in[CONV_STATE].data + at * other, other, window + at * other);
    }

    const LayerKernel &op;
    Input in[INPUTS];
    int64_t batch, hidden, mlp, total, selected, key_dim, value_dim, keys, values, channels, groups, width, small;
    float *y, *state, *window;
};

void LayerKernel::compute(const Ort::KernelContext &context) const {
    const Step s(*this, context);
    const std::vector<const float *> x = rows_of(s.in[X].data, s.batch, s.hidden);
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };

    Rows normed(s.batch, s.hidden), products(s.batch, s.small);
    for (int64_t b = 0; b < s.batch; ++b) rms_norm(normed[b], x[at(b)], s.in[ATTENTION_NORM].data, s.hidden, eps);
    Products first;
    first.add(s.in[SMALL].data, s.hidden, s.small, s.small, normed.read, products.write);
    run_all(context, first);
    std::vector<int64_t> memory(at(s.batch * s.selected));
    std::vector<float> weight(at(s.batch * s.selected));
    for (int64_t b = 0; b < s.batch; ++b)
        s.route(products[b], memory.data() + b * s.selected, weight.data() + b * s.selected);

    const int64_t row = s.keys + s.groups * (s.keys + s.values), part = s.keys + s.values;
    Rows projected(s.batch, row), gate(s.in[OUTPUT_GATE].data ? s.batch : 0, s.values);
    Products second;
    second.add(s.in[QKV].data, s.hidden, row, s.keys, normed.read, projected.write);
    for (int64_t group = 0; group < s.groups; ++group) {
        std::vector<const float *> readers;
        std::vector<float *> targets;
        for (int64_t b = 0; b < s.batch; ++b) {
            const int64_t *chosen = memory.data() + b * s.selected;
            if (std::any_of(chosen, chosen + s.selected, [&](int64_t m) { return s.group_of(m) == group; })) {
                readers.push_back(normed.read[at(b)]);
                targets.push_back(projected[b] + s.keys + group * part);
            }
        }
        second.add(s.in[QKV].data + s.keys + group * part, s.hidden, row, part, readers, targets);
    }
    if (s.in[OUTPUT_GATE].data) second.add(s.in[OUTPUT_GATE].data, s.hidden, s.values, s.values, normed.read, gate.write);
    run_all(context, second);

    Rows read(s.batch * s.selected, s.values), o(s.batch, s.values);
    const int64_t rules = s.batch * s.selected * heads;
    const bool copies = s.state != s.in[RECURRENT_STATE].data || s.window != s.in[CONV_STATE].data;
    parallel(context, rules + (copies ? s.batch * s.total : 0), [&](int64_t i) {
        if (i < rules) {
            const int64_t slot = i / heads, b = slot / s.selected;
            s.remember(b, memory[at(slot)], i % heads, projected[b], products[b], read[slot]);
            return;
        }
        const int64_t b = (i - rules) / s.total, m = (i - rules) % s.total, *chosen = memory.data() + b * s.selected;
        if (std::find(chosen, chosen + s.selected, m) == chosen + s.selected) s.keep(b, m);
    });
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t j = 0; j < s.selected; ++j)
            add_scaled(o[b], read[b * s.selected + j], weight[at(b * s.selected + j)], s.values);
        for (int64_t h = 0; h < value_heads; ++h) {
            float *head = o[b] + h * s.value_dim;
            rms_norm(head, head, s.in[O_NORM].data, s.value_dim, eps);
        }
        if (s.in[OUTPUT_GATE].data) {
            gate_with(gate[b], o[b], s.values);
            std::copy_n(gate[b], s.values, o[b]);
        }
    }

    Rows middle(s.batch, s.hidden), left(s.batch, s.mlp), right(s.batch, s.mlp);
    Products third;
    third.add(s.in[O].data, s.values, s.hidden, s.hidden, o.read, middle.write, x);
    run_all(context, third);
    for (int64_t b = 0; b < s.batch; ++b) rms_norm(normed[b], middle[b], s.in[MLP_NORM].data, s.hidden, eps);
    Products gates, ups, last;
    gates.add(s.in[GATE].data, s.hidden, s.mlp, s.mlp, normed.read, left.write);
    ups.add(s.in[UP].data, s.hidden, s.mlp, s.mlp, normed.read, right.write);
    parallel(context, gates.pieces(), [&](int64_t piece) {
        gates.run(piece), ups.run(piece);
        const int64_t begin = piece * COLUMNS, n = std::min(COLUMNS, s.mlp - begin);
        for (int64_t b = 0; b < s.batch; ++b) gate_with(left[b] + begin, right[b] + begin, n);
    });
    std::vector<float *> out;
    for (int64_t b = 0; b < s.batch; ++b) out.push_back(s.y + b * s.hidden);
    last.add(s.in[DOWN].data, s.mlp, s.hidden, s.hidden, left.read, out, middle.read);
    run_all(context, last);
}

struct HeadKernel {
    HeadKernel(const OrtApi &, const OrtKernelInfo *raw) : eps(Ort::ConstKernelInfo{raw}.GetAttribute<float>("eps")) {}

    OrtStatusPtr ComputeV2(OrtKernelContext *raw) {
        try {
            compute(Ort::KernelContext(raw));
            return nullptr;
        } catch (const Ort::Exception &error) {
            return Ort::Status(error).release();
        } catch (const std::exception &error) {
            return Ort::Status(error.what(), ORT_FAIL).release();
        }
    }

private:
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
    static const DecodeHead head;
    static Ort::CustomOpDomain domain{"mom"};
    static bool added = false;
    try {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!added) {
            domain.Add(&layer);
            domain.Add(&head);
            added = true;
        }
        Ort::UnownedSessionOptions(options).Add(domain);
    } catch (const Ort::Exception &error) {
        return Ort::Status(error).release();
    }
    return nullptr;
}
