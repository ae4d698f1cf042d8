// Runs the plugin library of a kernel pack outside TensorRT and compares its outputs bit for bit.
//
//   check_plugin LIBRARY CASES
//
// CASES/plugin.txt has per call a line "function batch inputs outputs" and per tensor a line "name type rank sizes...
// file": an input's bytes, or an output's expected ones, in the plugin's order.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;
using Bytes = std::vector<char>;

struct Tensor {
    PluginTensorDesc desc{};
    Bytes bytes;
    uint64_t pointer = 0;
};

Bytes read(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

Tensor next(std::istream &list, const std::string &folder) {
    std::string name, type, file;
    Tensor tensor;
    list >> name >> type >> tensor.desc.dims.nbDims;
    for (int i = 0; i < tensor.desc.dims.nbDims; ++i) list >> tensor.desc.dims.d[i];
    list >> file;
    tensor.desc.type = type == "bfloat16" ? DataType::kBF16 : type == "float16" ? DataType::kHALF : DataType::kFLOAT;
    tensor.desc.format = TensorFormat::kLINEAR;
    tensor.bytes = read(folder + "/" + file);
    return tensor;
}

template <class Function>
Function find(void *library, const char *name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: check_plugin LIBRARY CASES\n"), 2;
    const std::string folder = argv[2];
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
    const auto creators = find<IPluginCreatorInterface *const *(*)(int32_t &)>(library, "getCreators");
    const auto use_device = find<int (*)(int)>(library, "mom_use_device");
    const auto error = find<const char *(*)()>(library, "mom_error");
    if (use_device(0)) return std::fprintf(stderr, "%s\n", error()), 2;
    void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
    const auto allocate = find<int (*)(uint64_t *, size_t)>(cuda, "cuMemAlloc_v2");
    const auto to_device = find<int (*)(uint64_t, const void *, size_t)>(cuda, "cuMemcpyHtoD_v2");
    const auto to_host = find<int (*)(void *, uint64_t, size_t)>(cuda, "cuMemcpyDtoH_v2");
    const auto synchronize = find<int (*)()>(cuda, "cuCtxSynchronize");

    int32_t count = 0;
    auto *creator = static_cast<IPluginCreatorV3One *>(creators(count)[0]);
    std::ifstream list(folder + "/plugin.txt");
    std::string function;
    int64_t batch = 0;
    size_t num_inputs = 0, num_outputs = 0;
    int calls = 0, wrong = 0;
    while (list >> function >> batch >> num_inputs >> num_outputs) {
        const PluginField field{"function", function.c_str(), PluginFieldType::kCHAR,
                                static_cast<int32_t>(function.size())};
        const PluginFieldCollection fields{1, &field};
        IPluginV3 *plugin = creator->createPlugin("node", &fields, TensorRTPhase::kRUNTIME);
        if (!plugin) return std::fprintf(stderr, "%s: no plugin\n", function.c_str()), 2;
        auto *build = static_cast<IPluginV3OneBuild *>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        auto *run = static_cast<IPluginV3OneRuntime *>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        std::vector<Tensor> inputs(num_inputs), outputs(num_outputs);
        for (Tensor &tensor : inputs) tensor = next(list, folder);
        for (Tensor &tensor : outputs) tensor = next(list, folder);
        std::vector<PluginTensorDesc> in, out;
        std::vector<DynamicPluginTensorDesc> in_ranges, out_ranges, all;
        std::vector<void const *> in_pointers;
        std::vector<void *> out_pointers;
        for (std::vector<Tensor> *side : {&inputs, &outputs}) {
            for (Tensor &tensor : *side) {
                if (allocate(&tensor.pointer, tensor.bytes.size())) return std::fprintf(stderr, "no memory\n"), 2;
                const bool input = side == &inputs;
                DynamicPluginTensorDesc range{};
                range.desc = tensor.desc;
                range.min = range.max = range.opt = tensor.desc.dims;
                (input ? in : out).push_back(tensor.desc);
                (input ? in_ranges : out_ranges).push_back(range);
                all.push_back(range);
                void *pointer = reinterpret_cast<void *>(tensor.pointer);
                if (input) in_pointers.push_back(pointer);
                if (!input) out_pointers.push_back(pointer);
                if (input) to_device(tensor.pointer, tensor.bytes.data(), tensor.bytes.size());
            }
        }
        const auto inputs_count = static_cast<int32_t>(num_inputs), outputs_count = static_cast<int32_t>(num_outputs);
        bool fits = build->getNbOutputs() == outputs_count;
        for (int32_t i = 0; i < inputs_count + outputs_count; ++i)
            fits = fits && build->supportsFormatCombination(i, all.data(), inputs_count, outputs_count);
        if (!fits || run->onShapeChange(in.data(), inputs_count, out.data(), outputs_count))
            return std::fprintf(stderr, "%s: the plugin refuses the tensors\n", function.c_str()), 2;
        const size_t size = build->getWorkspaceSize(in_ranges.data(), inputs_count, out_ranges.data(), outputs_count);
        uint64_t workspace = 0;
        allocate(&workspace, size);
        const int code = run->enqueue(in.data(), out.data(), in_pointers.data(), out_pointers.data(),
                                      reinterpret_cast<void *>(workspace), nullptr);
        if (code || synchronize()) return std::fprintf(stderr, "%s: %s\n", function.c_str(), error()), 2;
        ++calls;
        for (std::vector<Tensor> *side : {&inputs, &outputs}) {
            for (size_t i = 0; i < side->size(); ++i) {
                Bytes got((*side)[i].bytes.size());
                to_host(got.data(), (*side)[i].pointer, got.size());
                if (got != (*side)[i].bytes) {
                    ++wrong;
                    std::printf("%s %ld: %s %zu differs\n", function.c_str(), static_cast<long>(batch),
                                side == &inputs ? "input" : "output", i);
                }
            }
        }
        delete plugin;
    }
    std::printf("%d calls, %d tensors differ\n", calls, wrong);
    return wrong || !calls;
}
