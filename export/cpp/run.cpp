// Generates greedily from this folder with ONNX Runtime's C++ API, without Python:
//
//   run FOLDER PROMPT [MAX_NEW_TOKENS] [--ids]
//
// The prompt's bytes are its tokens (--ids: the prompt is token ids, as is what is printed). Build with the headers of
// any ONNX Runtime from 1.18 and a library at least as new as the one in manifest.json:
//
//   g++ -std=c++17 -O2 run.cpp -o run -I.../include/onnxruntime -L.../lib -Wl,-rpath,.../lib -lonnxruntime

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__aarch64__)
constexpr char kMachine[] = "aarch64";
#else
constexpr char kMachine[] = "x86_64";
#endif

constexpr int64_t kPrefillTokens = 4096;  // of one call; longer prompts go through in pieces

// A graph and the names of its inputs and outputs: the tokens (logits) first, then the states in one order.
struct Graph {
  Graph(const Ort::Env& env, const std::string& path, const Ort::SessionOptions& options)
      : session(env, path.c_str(), options) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
      inputs.push_back(session.GetInputNameAllocated(i, allocator).get());
    }
    for (size_t i = 0; i < session.GetOutputCount(); ++i) {
      outputs.push_back(session.GetOutputNameAllocated(i, allocator).get());
    }
  }

  std::vector<Ort::Value> run(const std::vector<Ort::Value>& values) {
    std::vector<const char*> in, out;
    for (const std::string& name : inputs) in.push_back(name.c_str());
    for (const std::string& name : outputs) out.push_back(name.c_str());
    return session.Run(Ort::RunOptions{nullptr}, in.data(), values.data(), in.size(), out.data(), out.size());
  }

  Ort::Session session;
  std::vector<std::string> inputs, outputs;
};

// Zeros for every past state of a graph, for one sequence; in every type of float zero is all bits clear.
std::vector<Ort::Value> init_state(const Graph& graph) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<Ort::Value> state;
  for (size_t i = 1; i < graph.inputs.size(); ++i) {
    const Ort::TypeInfo type = graph.session.GetInputTypeInfo(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::vector<int64_t> shape = info.GetShape();
    shape[0] = 1;
    const ONNXTensorElementDataType element = info.GetElementType();
    state.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), element));
    const size_t width = element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
    std::memset(state.back().GetTensorMutableRawData(), 0,
                width * state.back().GetTensorTypeAndShapeInfo().GetElementCount());
  }
  return state;
}

int64_t end_of_text(const std::string& folder) {
  std::ifstream file(folder + "/manifest.json");
  const std::string manifest((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::smatch found;
  return std::regex_search(manifest, found, std::regex(R"re("eos_token_id": (\d+))re")) ? std::stoll(found[1]) : -1;
}

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: run FOLDER PROMPT [MAX_NEW_TOKENS] [--ids]");
  const std::string folder = argv[1], prompt = argv[2];
  const bool print_ids = std::string(argv[argc - 1]) == "--ids";
  const int steps = argc > 3 && std::string(argv[3]) != "--ids" ? std::stoi(argv[3]) : 100;
  std::vector<int64_t> ids;
  if (print_ids) {
    std::stringstream stream(prompt);
    ids.assign(std::istream_iterator<int64_t>(stream), std::istream_iterator<int64_t>());
  } else {
    for (const unsigned char byte : prompt) ids.push_back(byte);
  }
  if (ids.empty()) throw std::runtime_error("PROMPT must have at least one token, got none");

  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "mom");
  // Built from mom_cpu.cpp, where there is one: the same graphs by operators of its own.
  const std::string operators = folder + "/libmom_cpu_" + kMachine + ".so";
  const bool fused = std::ifstream(operators).good() && std::ifstream(folder + "/decode_cpu.onnx").good();
  Ort::SessionOptions options;
  if (fused) options.RegisterCustomOpsLibrary(operators.c_str());
  const std::string suffix = fused ? "_cpu.onnx" : ".onnx";
  Graph prefill(env, folder + "/prefill" + suffix, options), decode(env, folder + "/decode" + suffix, options);
  std::vector<Ort::Value> state = init_state(decode);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  // Tokens in, the last token's best successor out; the state is carried on.
  const auto run = [&](int64_t* tokens, int64_t count) {
    const int64_t shape[] = {1, count};
    std::vector<Ort::Value> values;
    values.push_back(Ort::Value::CreateTensor<int64_t>(memory, tokens, count, shape, 2));
    for (Ort::Value& value : state) values.push_back(std::move(value));
    std::vector<Ort::Value> results = (count == 1 ? decode : prefill).run(values);
    const int64_t vocabulary = results[0].GetTensorTypeAndShapeInfo().GetShape()[2];
    const float* logits = results[0].GetTensorData<float>() + (count - 1) * vocabulary;
    const int64_t best = std::max_element(logits, logits + vocabulary) - logits;
    results.erase(results.begin());
    state = std::move(results);
    return best;
  };

  int64_t token = 0;
  const int64_t length = static_cast<int64_t>(ids.size());
  for (int64_t start = 0; start < length; start += kPrefillTokens) {
    token = run(ids.data() + start, std::min(kPrefillTokens, length - start));
  }
  const int64_t eos = print_ids ? -1 : end_of_text(folder);
  if (!print_ids) std::cout << prompt;
  for (int step = 0; step < steps && token != eos; ++step) {
    if (print_ids) {
      std::cout << token << ' ';
    } else if (token < 256) {
      std::cout << static_cast<char>(token);
    }
    std::cout << std::flush;
    if (step + 1 < steps) token = run(&token, 1);
  }
  std::cout << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
