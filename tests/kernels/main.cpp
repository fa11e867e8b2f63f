#include "check.h"
#include "cpu/isa.h"

namespace {

// Every half number comes back, and what lies between two goes to the nearer one, or to the even.
void halves() {
  bool same = true, nearest = true, even = true;
  for (uint32_t bits = 0; bits < 0x7c00u; ++bits) {
    const float value = kegfast::half_to_float(static_cast<uint16_t>(bits));
    same &= kegfast::float_to_half(value) == bits && kegfast::float_to_half(-value) == (bits | 0x8000u);
    const float next =
        bits + 1 < 0x7c00u ? kegfast::half_to_float(static_cast<uint16_t>(bits + 1)) : 65536.0f;
    const float middle = value + (next - value) / 2;
    even &= kegfast::float_to_half(middle) == bits + bits % 2;
    nearest &= kegfast::float_to_half(std::nextafter(middle, 0.0f)) == bits;
    nearest &= kegfast::float_to_half(std::nextafter(middle, 1e9f)) == bits + 1;
  }
  check::that(same, "half numbers come back");
  check::that(nearest, "rounding to the nearest half number");
  check::that(even, "ties to the even half number");
  check::that(kegfast::float_to_half(INFINITY) == 0x7c00u && kegfast::float_to_half(1e9f) == 0x7c00u,
              "what is too large for a half number is infinite");
  check::that((kegfast::float_to_half(NAN) & 0x7fffu) > 0x7c00u, "NaN as a half number");
}

}  // namespace

int main() {
  for (const std::string& isa : kegfast::compiled_isas()) {
    try {
      kegfast::set_isa(isa);
    } catch (const std::exception& error) {
      std::printf("%s: skipped, this processor has no such instructions\n", isa.c_str());
      continue;
    }
    halves();
    check::soft_target();
    check::diversity();
    check::tucker2();
    std::printf("%s: %d passed, %d failed\n", isa.c_str(), check::passed, check::failed);
  }
  return check::failed ? 1 : 0;
}
