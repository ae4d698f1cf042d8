// Greedy text from the engines of this folder: prefill once, then one token a step. CUDA and TensorRT alone.
//
//   g++ -O2 -std=c++17 tensorrt_runner.cpp -o tensorrt_runner -lnvinfer -lcudart              (TensorRT, JetPack)
//   g++ -O2 -std=c++17 tensorrt_runner.cpp -o tensorrt_runner -ltensorrt_rtx -lcudart         (TensorRT for RTX)
//   ./tensorrt_runner FOLDER NEW_TOKENS ID [ID ...]      token ids of the prompt; prints those that follow
//
// FOLDER holds prefill.engine and decode.engine or decode_touched.engine. The recurrent state lives in two sets of device
// buffers: a step reads past_key_values.* from one and writes present.* into the other. decode_touched gives only the
// memories that a token selected; there is one set then, and they are copied into it.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(cudaError_t status, char const* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kERROR) std::cerr << message << "\n";
    }
};

size_t size_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kINT64: return 8;
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32: return 4;
        default: throw std::runtime_error("inputs and outputs must be float32 or int64, got another type");
    }
}

// Device memory that frees itself.
class Buffer {
public:
    explicit Buffer(size_t bytes = 0) : bytes_(bytes) {
        if (bytes) check(cudaMalloc(&data_, bytes), "cudaMalloc");
    }
    Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Buffer() { cudaFree(data_); }
    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

using Buffers = std::map<std::string, Buffer>;

class Engine {
public:
    Engine(nvinfer1::IRuntime& runtime, std::string const& path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error(path + " must exist, got no such file; run: sh build.sh");
        std::vector<char> blob((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        engine_.reset(runtime.deserializeCudaEngine(blob.data(), blob.size()));
        if (!engine_)
            throw std::runtime_error(path + " must fit this GPU, its driver and this TensorRT, got one that it refuses; "
                                            "build or export it again");
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw std::runtime_error(path + ": no execution context; is there enough device memory?");
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) names_.push_back(engine_->getIOTensorName(i));
    }

    std::vector<std::string> const& names() const { return names_; }

    bool is_input(std::string const& name) const {
        return engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
    }

    // Shape of a tensor with the batch and the number of tokens put in.
    nvinfer1::Dims shape(std::string const& name, int64_t batch, int64_t tokens) const {
        nvinfer1::Dims dims = engine_->getTensorShape(name.c_str());
        dims.d[0] = batch;
        for (int axis = 1; axis < dims.nbDims; ++axis)
            if (dims.d[axis] < 0) dims.d[axis] = tokens;
        return dims;
    }

    size_t bytes(std::string const& name, int64_t batch, int64_t tokens) const {
        nvinfer1::Dims const dims = shape(name, batch, tokens);
        size_t count = size_of(engine_->getTensorDataType(name.c_str()));
        for (int axis = 0; axis < dims.nbDims; ++axis) count *= static_cast<size_t>(dims.d[axis]);
        return count;
    }

    int64_t largest_length() const {
        return engine_->getProfileShape("input_ids", 0, nvinfer1::OptProfileSelector::kMAX).d[1];
    }

    void set_shapes(int64_t batch, int64_t tokens) {
        for (auto const& name : names_)
            if (is_input(name) && !context_->setInputShape(name.c_str(), shape(name, batch, tokens)))
                throw std::runtime_error(name + ": batch " + std::to_string(batch) + " or " + std::to_string(tokens) +
                                         " tokens lie outside the profile that the engine was built for");
    }

    void bind(std::string const& name, void* address) {
        if (!context_->setTensorAddress(name.c_str(), address)) throw std::runtime_error("no tensor " + name);
    }

    bool enqueue(cudaStream_t stream) { return context_->enqueueV3(stream); }

private:
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::vector<std::string> names_;
};

std::string const kPast = "past_key_values.", kPresent = "present.";

bool starts_with(std::string const& text, std::string const& prefix) { return text.rfind(prefix, 0) == 0; }

class Model {
public:
    explicit Model(std::string const& folder) : runtime_(nvinfer1::createInferRuntime(logger_)) {
        if (!runtime_) throw std::runtime_error("TensorRT must find a GPU and a driver, got none");
        check(cudaStreamCreate(&stream_), "cudaStreamCreate");
        prefill_ = std::make_unique<Engine>(*runtime_, folder + "/prefill.engine");
        touched_ = std::ifstream(folder + "/decode_touched.engine").good();
        decode_ = std::make_unique<Engine>(*runtime_, folder + (touched_ ? "/decode_touched.engine" : "/decode.engine"));
        for (auto const& name : prefill_->names()) {
            if (!starts_with(name, kPast)) continue;
            for (Buffers& set : sets_) {
                Buffer buffer(prefill_->bytes(name, 1, 1));
                check(cudaMemset(buffer.data(), 0, buffer.bytes()), "cudaMemset");
                set.emplace(name.substr(kPast.size()), std::move(buffer));
            }
        }
        ids_ = Buffer(sizeof(int64_t) * static_cast<size_t>(prefill_->largest_length()));
        for (auto const& name : decode_->names())
            if (starts_with(name, kPresent) && name.find("touched") != std::string::npos)
                parts_.emplace(name, Buffer(decode_->bytes(name, 1, 1)));
        vocabulary_ = decode_->bytes("logits", 1, 1) / sizeof(float);
    }

    ~Model() {
        for (cudaGraphExec_t graph : graphs_)
            if (graph) cudaGraphExecDestroy(graph);
        cudaStreamDestroy(stream_);
    }

    // Reads the prompt, in pieces where it is longer than the profile; returns the likeliest next token.
    int64_t read(std::vector<int64_t> const& ids) {
        int64_t const piece = prefill_->largest_length();
        Buffer logits;
        int64_t tokens = 0;
        for (size_t start = 0; start < ids.size(); start += static_cast<size_t>(piece)) {
            tokens = std::min<int64_t>(piece, static_cast<int64_t>(ids.size() - start));
            check(cudaMemcpyAsync(ids_.data(), ids.data() + start, sizeof(int64_t) * static_cast<size_t>(tokens),
                                  cudaMemcpyHostToDevice, stream_), "copy of the ids");
            logits = Buffer(prefill_->bytes("logits", 1, tokens));
            prefill_->set_shapes(1, tokens);
            bind(*prefill_, logits.data());
            if (!prefill_->enqueue(stream_)) throw std::runtime_error("prefill did not run");
            check(cudaStreamSynchronize(stream_), "prefill");
            current_ = 1 - current_;
        }
        logits_ = Buffer(sizeof(float) * vocabulary_);
        decode_->set_shapes(1, 1);
        return best(static_cast<char*>(logits.data()) + sizeof(float) * vocabulary_ * static_cast<size_t>(tokens - 1));
    }

    // One token on; returns the likeliest next one.
    int64_t step(int64_t id) {
        check(cudaMemcpyAsync(ids_.data(), &id, sizeof id, cudaMemcpyHostToDevice, stream_), "copy of the id");
        if (graphs_[current_]) {
            check(cudaGraphLaunch(graphs_[current_], stream_), "cudaGraphLaunch");
        } else {
            bind(*decode_, logits_.data());
            if (!decode_->enqueue(stream_)) throw std::runtime_error("decode did not run");
            capture();
        }
        if (touched_) write_back(); else current_ = 1 - current_;
        return best(logits_.data());
    }

private:
    void bind(Engine& engine, void* logits) {
        for (auto const& name : engine.names()) {
            if (name == "input_ids") engine.bind(name, ids_.data());
            else if (name == "logits") engine.bind(name, logits);
            else if (starts_with(name, kPast)) engine.bind(name, sets_[current_].at(name.substr(kPast.size())).data());
            else if (parts_.count(name)) engine.bind(name, parts_.at(name).data());
            else engine.bind(name, sets_[1 - current_].at(name.substr(kPresent.size())).data());
        }
    }

    // A CUDA graph of the step just run, one for each set that is read; without one where the engine allows none.
    void capture() {
        if (no_graphs_ || !warm_[current_]) {
            warm_[current_] = true;
            return;
        }
        cudaGraph_t graph = nullptr;
        bool ok = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
        if (ok) {
            bool const ran = decode_->enqueue(stream_);
            ok = cudaStreamEndCapture(stream_, &graph) == cudaSuccess && ran && graph != nullptr;
        }
        ok = ok && cudaGraphInstantiate(&graphs_[current_], graph, 0) == cudaSuccess;
        if (graph) cudaGraphDestroy(graph);
        if (!ok) {
            no_graphs_ = true;
            graphs_[current_] = nullptr;
            cudaGetLastError();
        }
    }

    // Copies the memories that the token selected into the state.
    void write_back() {
        for (auto const& [name, part] : parts_) {
            std::string const layer = name.substr(kPresent.size(), name.find('.', kPresent.size()) - kPresent.size());
            if (name != kPresent + layer + ".touched_index") continue;
            std::vector<int64_t> index(part.bytes() / sizeof(int64_t));
            check(cudaMemcpyAsync(index.data(), part.data(), part.bytes(), cudaMemcpyDeviceToHost, stream_), "index");
            check(cudaStreamSynchronize(stream_), "decode");
            for (auto const& [from, to] : {std::pair<char const*, char const*>{"touched_state", "recurrent_state"},
                                           {"touched_conv_state", "conv_state"}}) {
                auto const source = parts_.find(kPresent + layer + "." + from);
                if (source == parts_.end()) continue;
                size_t const bytes = source->second.bytes() / index.size();
                char* const target = static_cast<char*>(sets_[current_].at(layer + "." + to).data());
                for (size_t choice = 0; choice < index.size(); ++choice)
                    check(cudaMemcpyAsync(target + bytes * static_cast<size_t>(index[choice]),
                                          static_cast<char*>(source->second.data()) + bytes * choice, bytes,
                                          cudaMemcpyDeviceToDevice, stream_), "write back");
            }
        }
    }

    int64_t best(void const* logits) {
        std::vector<float> values(vocabulary_);
        check(cudaMemcpyAsync(values.data(), logits, sizeof(float) * vocabulary_, cudaMemcpyDeviceToHost, stream_),
              "copy of the logits");
        check(cudaStreamSynchronize(stream_), "step");
        return std::max_element(values.begin(), values.end()) - values.begin();
    }

    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<Engine> prefill_, decode_;
    cudaStream_t stream_ = nullptr;
    Buffers sets_[2], parts_;
    Buffer ids_, logits_;
    cudaGraphExec_t graphs_[2] = {nullptr, nullptr};
    bool warm_[2] = {false, false}, no_graphs_ = false, touched_ = false;
    int current_ = 0;
    size_t vocabulary_ = 0;
};

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 4) {
        std::cerr << "usage: " << argv[0] << " FOLDER NEW_TOKENS ID [ID ...]\n";
        return 2;
    }
    std::vector<int64_t> ids;
    for (int i = 3; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
    Model model(argv[1]);
    int64_t token = model.read(ids);
    for (int i = std::atoi(argv[2]); i > 0; --i) {
        std::cout << token << (i == 1 ? "\n" : " ") << std::flush;
        if (i > 1) token = model.step(token);
    }
    return 0;
} catch (std::exception const& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
}
