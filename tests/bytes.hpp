// A sequence of bytes of any length that need not be stored: byte i is a
// function of i, so the sender and the checker need only an offset.

#ifndef WARMPROXY_TESTS_BYTES_HPP
#define WARMPROXY_TESTS_BYTES_HPP

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bytes {

// Eight bytes at a time, so that generating gigabytes takes little time.
inline std::uint64_t word(std::uint64_t index) {
  auto w = (index + 1) * 0x9E3779B97F4A7C15u;
  return w ^ (w >> 29);
}

inline unsigned char at(std::uint64_t offset) {
  return static_cast<unsigned char>(word(offset / 8) >> (offset % 8 * 8));
}

inline void fill(char *out, std::size_t n, std::uint64_t offset) {
  std::size_t i = 0;
  while (i < n) {
    if ((offset + i) % 8 == 0 && n - i >= 8) {
      auto w = word((offset + i) / 8);
      for (int b = 0; b < 8; ++b) {
        out[i++] = static_cast<char>(w >> (b * 8));
      }
    } else {
      out[i] = static_cast<char>(at(offset + i));
      ++i;
    }
  }
}

// Whether these n bytes are those of the sequence from `offset` on.
inline bool match(const char *data, std::size_t n, std::uint64_t offset) {
  char expected[4096];
  while (n > 0) {
    auto step = n < sizeof(expected) ? n : sizeof(expected);
    fill(expected, step, offset);
    if (std::memcmp(data, expected, step) != 0) { return false; }
    data += step;
    offset += step;
    n -= step;
  }
  return true;
}

} // namespace bytes

#endif
