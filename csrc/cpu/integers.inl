// Arithmetic of sizes: no template of the standard library may be instantiated per instruction set.
#pragma once

#include <cstdint>

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t clamp(int64_t v, int64_t low, int64_t high) {
  return smaller(larger(v, low), high);
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
