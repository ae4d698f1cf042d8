// The functions of a kernel pack as operators of ONNX Runtime: a custom operator library for its CUDA provider.
//
// Node: Kernels of the domain "mom", all kernels of one function (mom_kernels.h) one after the other.
//   function   its name
//   inputs     the buffers' names, one per input after the first, separated by spaces
//   offsets    where each of them begins in its input, in bytes
//   outputs    the buffers' names, one per output; one that is an input as well is written in place: a copy, unless the
//              runtime gave both one memory
//   columns    of each output: its shape is [values / columns, columns], or one axis where it is 0
//   like       of each output: the buffer among the inputs that has its shape, -1 for none
//   numbers    names of whole numbers that are not those of the table (strides), and their values
//   rows       per token, for functions of rows
// Input 0 is input_ids [B, T], of which the shape alone is read: it gives batch, sequences, chunks and tokens.
// KernelsInPlace is the same; its output 0 is the memory of its input 1.
//
// Build it in the pack's folder, where it looks for the kernels:
//   g++ -std=c++17 -O2 -shared -fPIC -I<ONNX Runtime>/include mom_onnx.cpp mom_launch.cpp -o libmom_onnx_$(uname -m).so -ldl
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "mom_kernels.h"

#ifndef MOM_PROVIDER
#define MOM_PROVIDER "CUDAExecutionProvider"
#endif

namespace {

Ort::Status failed(const std::string &text) { return Ort::Status(("mom: " + text).c_str(), ORT_INVALID_ARGUMENT); }

// One pack a device, for all sessions; a pack is used by one thread at a time.
std::mutex mutex;

mom_pack *pack_of_device() {
    static std::map<int, mom_pack *> packs;
    const int device = mom_device();
    if (device < 0) return nullptr;
    mom_pack *&pack = packs[device];
    if (!pack) pack = mom_open(mom_folder());
    return pack;
}

std::vector<std::string> words(const std::string &text) {
    std::istringstream stream(text);
    std::vector<std::string> found;
    for (std::string word; stream >> word;) found.push_back(word);
    return found;
}

// A buffer of a function at a first size; sizes may be formulas of that range alone.
const mom_argument *find_argument(const std::string &function, const std::string &name, uint32_t first) {
    const mom_argument *found = nullptr;
    for (uint32_t i = 0; i < mom_kernel_count; ++i) {
        const mom_kernel &kernel = mom_kernels[i];
        if (std::string(kernel.name).compare(0, function.size() + 1, function + ".")) continue;
        for (uint32_t j = 0; j < kernel.num_arguments; ++j) {
            if (kernel.arguments[j].kind != MOM_POINTER || name != kernel.arguments[j].name) continue;
            found = &kernel.arguments[j];
            if (kernel.smallest <= first && first <= kernel.largest) return found;
        }
    }
    return found;
}

// Those that the node need not name: nothing lies behind them.
std::vector<const char *> empty_buffers(const std::string &function) {
    std::vector<const char *> found;
    for (uint32_t i = 0; i < mom_kernel_count; ++i) {
        const mom_kernel &kernel = mom_kernels[i];
        if (std::string(kernel.name).compare(0, function.size() + 1, function + ".")) continue;
        for (uint32_t j = 0; j < kernel.num_arguments; ++j) {
            const mom_argument &argument = kernel.arguments[j];
            const mom_formula &amount = argument.amount;
            const bool none = !amount.base && !amount.per_unit[0] && !amount.per_unit[1] && !amount.per_unit[2];
            if (argument.kind == MOM_POINTER && none && !amount.per) found.push_back(argument.name);
        }
    }
    return found;
}

int64_t item_bytes(const mom_argument *argument) {
    const std::string type = argument->type;
    if (type == "*i64") return 8;
    return type == "*fp32" || type == "*i32" ? 4 : type == "*u8" ? 1 : 2;
}

struct Kernel {
    Kernel(const OrtApi &, const OrtKernelInfo *raw) {
        const Ort::ConstKernelInfo info{raw};
        function_ = info.GetAttribute<std::string>("function");
        inputs_ = words(info.GetAttribute<std::string>("inputs"));
        outputs_ = words(info.GetAttribute<std::string>("outputs"));
        numbers_ = words(info.GetAttribute<std::string>("numbers"));
        offsets_ = info.GetAttributes<int64_t>("offsets");
        columns_ = info.GetAttributes<int64_t>("columns");
        like_ = info.GetAttributes<int64_t>("like");
        values_ = info.GetAttributes<int64_t>("values");
        rows_ = info.GetAttribute<int64_t>("rows");
        empty_ = empty_buffers(function_);
        for (uint32_t i = 0; i < mom_function_count; ++i)
            if (function_ == mom_functions[i].name) table_ = &mom_functions[i];
        if (!table_) throw Ort::Exception("mom: the pack must have " + function_ + ", got none", ORT_INVALID_GRAPH);
        for (const auto *names : {&inputs_, &outputs_})
            for (const std::string &name : *names)
                if (!find_argument(function_, name, 1))
                    throw Ort::Exception("mom: " + function_ + " has no buffer " + name + "; export again", ORT_INVALID_GRAPH);
        const size_t named = inputs_.size();
        if (info.GetInputCount() != named + 1 || offsets_.size() != named || info.GetOutputCount() != outputs_.size() ||
            columns_.size() != outputs_.size() || like_.size() != outputs_.size() || values_.size() < numbers_.size())
            throw Ort::Exception("mom: attributes of " + function_ + " must fit its inputs and outputs", ORT_INVALID_GRAPH);
    }

    OrtStatusPtr ComputeV2(OrtKernelContext *raw) {
        try {
            return compute(Ort::KernelContext(raw)).release();
        } catch (const Ort::Exception &error) {
            return Ort::Status(error).release();
        } catch (const std::exception &error) {
            return failed(error.what()).release();
        }
    }

private:
    Ort::Status compute(const Ort::KernelContext &context) {
        const std::vector<int64_t> shape = context.GetInput(0).GetTensorTypeAndShapeInfo().GetShape();
        if (shape.size() != 2) return failed("input_ids must be [B, T]");
        uint32_t units[3] = {0, 0, 0};
        for (int i = 0; i < 3 && table_->units[i]; ++i) units[i] = size_of(table_->units[i], shape[0], shape[1]);
        std::vector<mom_buffer> buffers;
        std::vector<std::vector<int64_t>> shapes;
        for (size_t i = 0; i < inputs_.size(); ++i) {
            const Ort::ConstValue value = context.GetInput(i + 1);
            const auto info = value.GetTensorTypeAndShapeInfo();
            const mom_argument *argument = find_argument(function_, inputs_[i], units[0]);
            const int64_t held = static_cast<int64_t>(info.GetElementCount()) * item_bytes(argument);
            // A part of a wider buffer begins somewhere in it, and its rows are further apart.
            const int64_t wanted = mom_amount(argument, units);
            if (numbers_.empty() && !offsets_[i] ? held != wanted : held < wanted)
                return failed(function_ + " must have " + inputs_[i] + " of " + std::to_string(wanted) + " bytes, got " +
                              std::to_string(held) + "; pass tensors of this model and batch");
            shapes.push_back(info.GetShape());
            const auto pointer = reinterpret_cast<uint64_t>(value.GetTensorRawData());
            buffers.push_back({inputs_[i].c_str(), pointer + static_cast<uint64_t>(offsets_[i])});
        }
        void *stream = context.GetGPUComputeStream();
        for (size_t i = 0; i < outputs_.size(); ++i) {
            const mom_argument *argument = find_argument(function_, outputs_[i], units[0]);
            const int64_t count = mom_amount(argument, units) / item_bytes(argument);
            size_t own = 0;
            while (own < inputs_.size() && inputs_[own] != outputs_[i]) ++own;
            const bool in_place = own < inputs_.size();
            std::vector<int64_t> sizes{count};
            if (columns_[i]) sizes = {count / columns_[i], columns_[i]};
            if (like_[i] >= 0) sizes = shapes[static_cast<size_t>(like_[i])];
            Ort::UnownedValue value = context.GetOutput(i, sizes);
            const auto pointer = reinterpret_cast<uint64_t>(value.GetTensorMutableRawData());
            if (!in_place) {
                buffers.push_back({outputs_[i].c_str(), pointer});
                continue;
            }
            const auto bytes = static_cast<uint64_t>(mom_amount(argument, units));
            if (mom_copy(pointer, buffers[own].pointer, bytes, stream)) return failed(mom_error());
            buffers[own].pointer = pointer;
        }
        for (const char *name : empty_) buffers.push_back({name, buffers[0].pointer});
        std::vector<mom_number> numbers;
        for (size_t i = 0; i < numbers_.size(); ++i) numbers.push_back({numbers_[i].c_str(), static_cast<int32_t>(values_[i])});
        const std::lock_guard<std::mutex> lock(mutex);
        mom_pack *pack = pack_of_device();
        if (!pack || mom_run(pack, function_.c_str(), units, buffers.data(), static_cast<uint32_t>(buffers.size()),
                             numbers.data(), static_cast<uint32_t>(numbers.size()), stream))
            return failed(mom_error());
        return Ort::Status();
    }

    uint32_t size_of(const std::string &unit, int64_t batch, int64_t length) const {
        const auto sequences = static_cast<uint32_t>(batch), tokens = static_cast<uint32_t>(batch * length);
        if (unit == "tokens") return tokens;
        if (unit == "chunks") return mom_chunks(sequences, tokens);
        if (unit == "rows") return tokens * static_cast<uint32_t>(rows_);
        return sequences;
    }

    std::string function_;
    const mom_function *table_ = nullptr;
    std::vector<std::string> inputs_, outputs_, numbers_;
    std::vector<int64_t> offsets_, columns_, like_, values_;
    std::vector<const char *> empty_;
    int64_t rows_ = 1;
};

template <class Self>
struct Operator : Ort::CustomOpBase<Self, Kernel, true> {
    OrtStatusPtr CreateKernelV2(const OrtApi &api, const OrtKernelInfo *info, void **kernel) const {
        try {
            *kernel = new Kernel(api, info);
            return nullptr;
        } catch (const Ort::Exception &error) {
            return Ort::Status(error).release();
        }
    }
    const char *GetExecutionProviderType() const { return MOM_PROVIDER; }
    size_t GetInputTypeCount() const { return 1; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
    bool GetVariadicInputHomogeneity() const { return false; }
    bool GetVariadicOutputHomogeneity() const { return false; }
};

struct Kernels : Operator<Kernels> {
    const char *GetName() const { return "Kernels"; }
};

struct KernelsInPlace : Operator<KernelsInPlace> {
    KernelsInPlace() {
        GetAliasMap = [](int **inputs, int **outputs) -> size_t {
            *inputs = new int(1);
            *outputs = new int(0);
            return 1;
        };
        ReleaseAliasMap = [](int *inputs, int *outputs) {
            delete inputs;
            delete outputs;
        };
    }
    const char *GetName() const { return "KernelsInPlace"; }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                                const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (!api)
        return base->GetApi(1)->CreateStatus(ORT_FAIL, "mom: libmom_onnx must be built with the headers of this ONNX "
                                                       "Runtime or an older one");
    Ort::InitApi(api);
    static const Kernels kernels;
    static const KernelsInPlace in_place;
    static Ort::CustomOpDomain domain{"mom"};
    static bool added = false;
    try {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!added) {
            domain.Add(&kernels);
            domain.Add(&in_place);
            added = true;
        }
        Ort::UnownedSessionOptions(options).Add(domain);
    } catch (const Ort::Exception &error) {
        return Ort::Status(error).release();
    }
    return nullptr;
}
