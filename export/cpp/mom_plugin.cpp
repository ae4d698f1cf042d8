// The decode step of a kernel pack as a TensorRT plugin (IPluginV3, TensorRT 10 and later).
//
// Node: MoMDecodeStep, version 1, domain or namespace "mom", attribute function (such as "decode_step_gated_delta").
// Inputs: the pointer arguments of <function>.decode_state in the table's order without y (q, kv, logits, ..., state,
// conv_state), then those that <function>.decode_combine has beside them (norm_weight, gate). Outputs: o, state and, with a convolution, conv_state after the token. Sizes, types and the update rule
// are those of the pack.
//
// Build it in the pack's folder, where it looks for the kernels, and load it with
// trtexec --dynamicPlugins=PACK/libmom_plugin.so or IPluginRegistry::loadLibrary:
//   g++ -std=c++17 -O2 -shared -fPIC -I<TensorRT>/include -I<CUDA>/include mom_plugin.cpp mom_launch.cpp
//       -o libmom_plugin.so -ldl
#include <NvInferRuntime.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "mom_kernels.h"

namespace {

using namespace nvinfer1;

constexpr char kName[] = "MoMDecodeStep", kVersion[] = "1", kNamespace[] = "mom";
nvinfer1::ILoggerFinder *logger_finder = nullptr;

void log_error(const char *text) {
    ILogger *logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger) logger->log(ILogger::Severity::kERROR, text);
}

bool is(const mom_argument *argument, const char *name) { return !std::strcmp(argument->name, name); }

DataType type_of(const mom_argument *argument) {
    const std::string type = argument->type;
    if (type == "*bf16") return DataType::kBF16;
    if (type == "*fp16") return DataType::kHALF;
    if (type == "*i64") return DataType::kINT64;
    return DataType::kFLOAT;
}

// What the node reads and writes: the pointer arguments of the two kernels, whatever the architecture.
struct Signature {
    std::vector<const mom_argument *> inputs, outputs;
    const mom_argument *scratch = nullptr;

    explicit Signature(const std::string &function) {
        const mom_kernel *state = find(function + ".decode_state"), *combine = find(function + ".decode_combine");
        if (!state || !combine) return;
        for (uint32_t i = 0; i < combine->num_arguments; ++i)
            if (is(&combine->arguments[i], "o")) outputs.push_back(&combine->arguments[i]);
        for (uint32_t i = 0; i < state->num_arguments; ++i) {
            const mom_argument *argument = &state->arguments[i];
            if (argument->kind != MOM_POINTER) continue;
            if (is(argument, "y")) {
                scratch = argument;
                continue;
            }
            inputs.push_back(argument);
            if (is(argument, "state") || is(argument, "conv_state")) outputs.push_back(argument);
        }
        for (uint32_t i = 0; i < combine->num_arguments; ++i) {
            const mom_argument *argument = &combine->arguments[i];
            const bool known = is(argument, "y") || is(argument, "o") || index(argument->name) >= 0;
            if (argument->kind == MOM_POINTER && !known) inputs.push_back(argument);
        }
    }

    bool whole() const { return !inputs.empty() && scratch; }

    int32_t index(const char *name) const {
        for (size_t i = 0; i < inputs.size(); ++i)
            if (is(inputs[i], name)) return static_cast<int32_t>(i);
        return -1;
    }

    static const mom_kernel *find(const std::string &name) {
        for (uint32_t i = 0; i < mom_kernel_count; ++i)
            if (name == mom_kernels[i].name) return &mom_kernels[i];
        return nullptr;
    }
};

class DecodeStep final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit DecodeStep(std::string function) : function_(std::move(function)), signature_(function_) {}
    ~DecodeStep() override { mom_close(pack_); }

    bool whole() const { return signature_.whole(); }

    IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild *>(this);
        if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime *>(this);
        return static_cast<IPluginV3OneCore *>(this);
    }
    IPluginV3 *clone() noexcept override { return new DecodeStep(function_); }

    AsciiChar const *getPluginName() const noexcept override { return kName; }
    AsciiChar const *getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const *getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(signature_.outputs.size()); }

    int32_t getOutputDataTypes(DataType *types, int32_t count, DataType const *, int32_t) const noexcept override {
        if (count != getNbOutputs()) return 1;
        for (int32_t i = 0; i < count; ++i) types[i] = type_of(signature_.outputs[i]);
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const *inputs, int32_t count, DimsExprs const *, int32_t, DimsExprs *outputs,
                            int32_t num_outputs, IExprBuilder &) noexcept override {
        const int32_t q = signature_.index("q"), state = signature_.index("state");
        if (count != static_cast<int32_t>(signature_.inputs.size()) || num_outputs != getNbOutputs()) return 1;
        if (inputs[q].nbDims != 3 || inputs[state].nbDims != 5) return 1;
        outputs[0].nbDims = 4; /* [B, T, HV, V] */
        outputs[0].d[0] = inputs[q].d[0];
        outputs[0].d[1] = inputs[q].d[1];
        outputs[0].d[2] = inputs[state].d[2];
        outputs[0].d[3] = inputs[state].d[4];
        for (int32_t i = 1; i < num_outputs; ++i) outputs[i] = inputs[signature_.index(signature_.outputs[i]->name)];
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const *tensors, int32_t num_inputs,
                                   int32_t) noexcept override {
        const mom_argument *argument =
            position < num_inputs ? signature_.inputs[position] : signature_.outputs[position - num_inputs];
        const PluginTensorDesc &desc = tensors[position].desc;
        return desc.format == TensorFormat::kLINEAR && desc.type == type_of(argument);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const *, int32_t, DynamicPluginTensorDesc const *,
                            int32_t) noexcept override {
        return 0;
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const *inputs, int32_t, DynamicPluginTensorDesc const *,
                            int32_t) const noexcept override {
        const uint32_t units[3] = {static_cast<uint32_t>(inputs[signature_.index("q")].max.d[0]), 0, 0};
        return static_cast<size_t>(mom_amount(signature_.scratch, units));
    }

    int32_t onShapeChange(PluginTensorDesc const *inputs, int32_t count, PluginTensorDesc const *,
                          int32_t) noexcept override {
        const int64_t batch = inputs[signature_.index("q")].dims.d[0];
        if (inputs[signature_.index("q")].dims.d[1] != 1) {
            log_error("MoMDecodeStep must get one token, got another length; call it once a token");
            return 1;
        }
        const uint32_t units[3] = {static_cast<uint32_t>(batch), 0, 0};
        for (int32_t i = 0; i < count; ++i) {
            if (bytes_of(inputs[i]) != mom_amount(signature_.inputs[i], units)) {
                const std::string name = signature_.inputs[i]->name;
                log_error(("MoMDecodeStep input " + name + " must have the pack's sizes; export it again").c_str());
                return 1;
            }
        }
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const *descriptions, PluginTensorDesc const *, void const *const *inputs,
                    void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
        if (!pack_) pack_ = mom_open(mom_folder());
        if (!pack_) return failed();
        const uint32_t units[3] = {static_cast<uint32_t>(descriptions[signature_.index("q")].dims.d[0]), 0, 0};
        std::vector<mom_buffer> buffers{{"y", address(workspace)}, {"o", address(outputs[0])}};
        for (size_t i = 0; i < signature_.inputs.size(); ++i)
            buffers.push_back({signature_.inputs[i]->name, address(inputs[i])});
        // The kernels advance the states in place: in the outputs, which first take the inputs' values.
        for (size_t i = 1; i < signature_.outputs.size(); ++i) {
            const mom_argument *state = signature_.outputs[i];
            mom_buffer &buffer = buffers[2 + static_cast<size_t>(signature_.index(state->name))];
            if (mom_copy(address(outputs[i]), buffer.pointer, static_cast<uint64_t>(mom_amount(state, units)), stream))
                return failed();
            buffer.pointer = address(outputs[i]);
        }
        const auto count = static_cast<uint32_t>(buffers.size());
        return mom_run(pack_, function_.c_str(), units, buffers.data(), count, nullptr, 0, stream) ? failed() : 0;
    }

    IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override { return clone(); }

    PluginFieldCollection const *getFieldsToSerialize() noexcept override {
        field_ = {"function", function_.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(function_.size())};
        fields_ = {1, &field_};
        return &fields_;
    }

private:
    static uint64_t address(void const *pointer) { return reinterpret_cast<uint64_t>(pointer); }

    static int64_t bytes_of(PluginTensorDesc const &desc) {
        int64_t bytes = desc.type == DataType::kINT64 ? 8 : desc.type == DataType::kFLOAT ? 4 : 2;
        for (int32_t i = 0; i < desc.dims.nbDims; ++i) bytes *= desc.dims.d[i];
        return bytes;
    }

    static int32_t failed() {
        log_error(mom_error());
        return 1;
    }

    std::string function_;
    Signature signature_;
    mom_pack *pack_ = nullptr;
    PluginField field_;
    PluginFieldCollection fields_;
};

class Creator final : public IPluginCreatorV3One {
public:
    IPluginV3 *createPlugin(AsciiChar const *, PluginFieldCollection const *fields, TensorRTPhase) noexcept override {
        std::string function;
        for (int32_t i = 0; i < fields->nbFields; ++i) {
            const PluginField &field = fields->fields[i];
            if (!std::strcmp(field.name, "function"))
                function.assign(static_cast<char const *>(field.data), static_cast<size_t>(field.length));
        }
        while (!function.empty() && function.back() == '\0') function.pop_back();
        auto plugin = std::make_unique<DecodeStep>(function);
        if (plugin->whole()) return plugin.release();
        log_error(("function must be a decode step of the pack, got \"" + function + "\"; see mom_kernels.h").c_str());
        return nullptr;
    }

    PluginFieldCollection const *getFieldNames() noexcept override { return &fields_; }
    AsciiChar const *getPluginName() const noexcept override { return kName; }
    AsciiChar const *getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const *getPluginNamespace() const noexcept override { return kNamespace; }

private:
    PluginField field_{"function", nullptr, PluginFieldType::kCHAR, 1};
    PluginFieldCollection fields_{1, &field_};
};

}  // namespace

// What TensorRT's registry looks for in a library that it loads.
extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder *finder) { logger_finder = finder; }

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static Creator creator;
    static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
    count = 1;
    return creators;
}

}  // extern "C"
