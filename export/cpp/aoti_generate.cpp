// Generates greedily from a folder of `mom-compile export --to aoti`, in a process without Python:
//
//   aoti_generate FOLDER PROMPT [MAX_NEW_TOKENS] [--ids]
//
// The prompt's bytes are its tokens (--ids: the prompt is token ids, as is what is printed). Build against the torch of
// the same version that exported, e.g. with T=$(python3 -c "import torch; print(torch.__path__[0])"):
//
//   g++ -std=c++20 -O1 aoti_generate.cpp -o aoti_generate -I$T/include -I$T/include/torch/csrc/api/include
//       -L$T/lib -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10      (and -ltorch_cuda -lc10_cuda)

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using Tensors = std::unordered_map<std::string, at::Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;

constexpr int64_t kPrefillTokens = 4096;  // of one call; longer prompts go through in pieces

std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> result;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) result.push_back(std::stoll(part));
  return result;
}

// The tensors of a safetensors file where the system maps it: nothing is copied, processes share it.
Tensors map_weights(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat status{};
  if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error(path + " must be there; copy the whole folder");
  void* mapped = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error(path + " could not be mapped");
  char* bytes = static_cast<char*>(mapped);
  uint64_t header_size = 0;
  std::memcpy(&header_size, bytes, sizeof header_size);
  const std::string header(bytes + 8, header_size);
  const std::regex entry(
      R"re("([^"]+)":\{"dtype":"([^"]+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\})re");
  Tensors weights;
  for (std::sregex_iterator it(header.begin(), header.end(), entry), end; it != end; ++it) {
    if ((*it)[2] != "F32") throw std::runtime_error((*it)[1].str() + " must be F32, got " + (*it)[2].str());
    const std::vector<int64_t> shape = numbers((*it)[3]);
    weights[(*it)[1]] = at::from_blob(bytes + 8 + header_size + std::stoull((*it)[4]), shape, at::kFloat);
  }
  return weights;
}

// Gives a package the weights that it names; they stay the caller's, so packages share them.
void give_weights(Loader& loader, const Tensors& weights) {
  Tensors wanted;
  for (const std::string& name : loader.get_constant_fqns()) wanted[name] = weights.at(name);
  loader.load_constants(wanted, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
}

// Zeros for one sequence, from "0.conv_state=5,48,3;0.recurrent_state=5,2,8,8;...".
std::vector<at::Tensor> init_state(const std::string& description, at::Device device) {
  std::vector<at::Tensor> state;
  std::stringstream stream(description);
  for (std::string part; std::getline(stream, part, ';');) {
    std::vector<int64_t> shape = numbers(part.substr(part.find('=') + 1));
    shape.insert(shape.begin(), 1);
    state.push_back(at::zeros(shape, at::TensorOptions().device(device)));
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
  if (argc < 3) throw std::runtime_error("usage: aoti_generate FOLDER PROMPT [MAX_NEW_TOKENS] [--ids]");
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

  const c10::InferenceMode guard;
  Tensors weights = map_weights(folder + "/weights.safetensors");
  Loader prefill(folder + "/prefill.pt2"), decode(folder + "/decode.pt2");
  auto metadata = decode.get_metadata();
  const at::Device device(metadata.at("AOTI_DEVICE_KEY"));
  for (auto& [name, weight] : weights) weight = weight.to(device);
  give_weights(prefill, weights);
  give_weights(decode, weights);
  std::vector<at::Tensor> state = init_state(metadata.at("mom_state"), device);

  // Tokens in, logits out; the state is carried on.
  const auto run = [&](const at::Tensor& tokens) {
    std::vector<at::Tensor> inputs = {tokens.to(device)};
    inputs.insert(inputs.end(), state.begin(), state.end());
    std::vector<at::Tensor> outputs = (tokens.size(1) == 1 ? decode : prefill).run(inputs);
    state.assign(outputs.begin() + 1, outputs.end());
    return outputs[0];
  };

  const at::Tensor tokens = at::tensor(ids, at::kLong).unsqueeze(0);
  at::Tensor logits;
  for (int64_t start = 0; start < tokens.size(1); start += kPrefillTokens) {
    logits = run(tokens.slice(1, start, std::min(start + kPrefillTokens, tokens.size(1))));
  }
  const int64_t eos = print_ids ? -1 : end_of_text(folder);
  if (!print_ids) std::cout << prompt;
  for (int step = 0; step < steps; ++step) {
    const int64_t token = logits.select(1, -1).argmax(-1).item<int64_t>();
    if (token == eos) break;
    if (print_ids) {
      std::cout << token << ' ';
    } else if (token < 256) {
      std::cout << static_cast<char>(token);
    }
    std::cout << std::flush;
    if (step + 1 < steps) logits = run(at::full({1, 1}, token, at::kLong));
  }
  std::cout << std::endl;
  return 0;
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << std::endl;
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
