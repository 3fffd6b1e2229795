// Runs the kernels of any processor on made-up numbers and prints the results, a line a value: for comparing one
// processor's build with another's.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace {

uint32_t state = 1;

// Uniform in [-2, 2), the same on every machine.
float number() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 22) - 2.0f;
}

std::vector<float> numbers(size_t count) {
  std::vector<float> out(count);
  for (float& x : out) x = number();
  return out;
}

void print(const char* name, const std::vector<float>& values) {
  for (float x : values) std::printf("%s: %.9g\n", name, static_cast<double>(x));
}

void print(const char* name, const std::vector<int32_t>& values) {
  for (int32_t x : values) std::printf("%s: %d\n", name, x);
}

// Two bytes a number are read as they are: bfloat16 of the same number, or float16 bits of about its size.
std::vector<unsigned char> stored(int dtype, const std::vector<float>& values) {
  std::vector<unsigned char> out(values.size() * (dtype == flex::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    const uint16_t half = dtype == flex::kBFloat16 ? bits >> 16 : 0x3000 + (bits >> 16 & 0x83ff);
    if (dtype == flex::kFloat32) std::memcpy(&out[4 * i], &bits, 4);
    else std::memcpy(&out[2 * i], &half, 2);
  }
  return out;
}

void print(const char* name, int dtype, const std::vector<unsigned char>& bytes) {
  for (size_t i = 0; i + 4 <= bytes.size() && dtype == flex::kFloat32; i += 4) {
    float x;
    std::memcpy(&x, &bytes[i], 4);
    std::printf("%s of dtype %d: %.9g\n", name, dtype, static_cast<double>(x));
  }
  for (size_t i = 0; i + 2 <= bytes.size() && dtype == flex::kBFloat16; i += 2) {
    uint16_t half;
    std::memcpy(&half, &bytes[i], 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    std::printf("%s of dtype %d: %.9g\n", name, dtype, static_cast<double>(x));
  }
}

}  // namespace

int main() {
  constexpr int kThreads = 2;
  constexpr int64_t kTokens = 7, kExperts = 9, kTop = 3, kRows = 5, kWidth = 13;

  for (int sigmoid = 0; sigmoid < 2; ++sigmoid) {
    const auto logits = numbers(kTokens * (kExperts + 1));
    std::vector<int32_t> ids(kTokens * kTop), offsets(kExperts + 1), order(kTokens * kTop);
    std::vector<float> weights(kTokens * kTop), scratch(kThreads * 2 * kExperts), gates(kTokens), bias{0.25f};
    flex::choose(logits.data(), kExperts + 1, nullptr, kTokens, kExperts, kTop, sigmoid, sigmoid, 1.5f, ids.data(),
                 weights.data(), scratch.data(), kThreads);
    flex::open_gates(logits.data(), kExperts + 1, kExperts, bias.data(), kTokens, 1, gates.data(), kThreads);
    std::vector<int32_t> token(kTokens * kTop);
    std::vector<float> scale(kTokens * kTop), slots(kTokens * kTop);
    flex::sort_rows(ids.data(), weights.data(), gates.data(), kTokens, kTop, kExperts, offsets.data(), order.data(),
                    token.data(), scale.data());
    flex::unsort_rows(scale.data(), order.data(), offsets.back(), kTokens * kTop, slots.data());
    print("ids", ids), print("offsets", offsets), print("order", order), print("token", token);
    print("weights", weights), print("gates", gates), print("scale", scale), print("slots", slots);
    auto gradient = logits;
    flex::choose_backward(gradient.data(), kExperts + 1, ids.data(), scale.data(), nullptr, kTokens, kExperts, kTop,
                          sigmoid, sigmoid, 1.5f, scratch.data(), kThreads);
    flex::open_gates_backward(gates.data(), gates.data(), kTokens, 1, gradient.data() + kExperts, kExperts + 1,
                              bias.data());
    print("gradient", gradient), print("bias", bias);
  }

  const flex::Kernels& plain = *flex::generic_kernels();
  for (int dtype : {flex::kFloat32, flex::kBFloat16, flex::kFloat16}) {
    const auto z = stored(dtype, numbers(kRows * 2 * kWidth)), da = stored(dtype, numbers(kRows * kWidth));
    const auto scale = numbers(kRows);
    const std::vector<int32_t> tokens{3, 0, 3, 1, 2};
    auto a = da, dz = z, scaled = da, gathered = da;
    std::vector<float> dscale(kRows), sums(4 * kWidth, 0.0f);
    plain.swiglu(dtype, z.data(), a.data(), kRows, kWidth, kThreads);
    plain.swiglu_backward(dtype, z.data(), da.data(), scale.data(), dz.data(), dscale.data(), scaled.data(), kRows,
                          kWidth, kThreads);
    plain.scatter_add(dtype, da.data(), tokens.data(), scale.data(), sums.data(), kRows, kWidth, kThreads);
    flex::gather_rows(da.data(), tokens.data(), gathered.data(), kRows, da.size() / kRows, kThreads);
    print("a", dtype, a), print("dz", dtype, dz), print("scaled", dtype, scaled), print("gathered", dtype, gathered);
    print("dscale", dscale), print("sums", sums);
  }
}
