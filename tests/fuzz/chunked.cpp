// Where a body ends, as Framing tells it, must not depend on how its bytes are
// split, and must be where the reference says.

#include "../../warmproxy.hpp"

#include "reference.hpp"

#include <algorithm>

namespace {

using warmproxy::detail::Framing;

struct Result {
  std::size_t taken = 0;
  std::string content;
  bool done = false, malformed = false;

  bool operator==(const Result &other) const {
    return taken == other.taken && content == other.content &&
           done == other.done && malformed == other.malformed;
  }
};

template <typename Next>
Result feed(Framing framing, std::string_view bytes, Next next) {
  Result result;
  while (!bytes.empty()) {
    const auto portion = bytes.substr(0, next());
    const auto taken = framing.take(portion, &result.content);
    REQUIRE(taken <= portion.size(), "took more than there was");
    REQUIRE(taken == portion.size() || framing.done() || framing.malformed(),
            "left something for no reason");
    result.taken += taken;
    bytes.remove_prefix(taken);
    if (taken < portion.size()) { break; }
  }
  result.done = framing.done();
  result.malformed = framing.malformed();
  REQUIRE(!result.done || !result.malformed, "done, and yet malformed");
  if (result.done || result.malformed) {
    REQUIRE(framing.take("0\r\n\r\n") == 0, "took something behind its end");
    REQUIRE(framing.done() == result.done, "changed its mind");
  }
  return result;
}

Result feed_in_all_ways(const Framing &framing, std::string_view bytes,
                        unsigned seed) {
  const auto whole = feed(framing, bytes, [&] { return bytes.size(); });
  REQUIRE(feed(framing, bytes, [] { return 1; }) == whole,
          "byte by byte it is another body");
  reference::Portions portions(seed);
  REQUIRE(feed(framing, bytes, [&] { return portions.next(); }) == whole,
          "in portions it is another body");
  return whole;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  if (size < 1 || size > warmproxy::detail::max_head) { return 0; }
  const unsigned seed = data[0];
  const std::string_view bytes(reinterpret_cast<const char *>(data) + 1,
                               size - 1);

  const auto chunked =
      feed_in_all_ways(Framing(Framing::Mode::chunked), bytes, seed);
  const auto expected = reference::chunked(bytes);
  REQUIRE(chunked.done == (expected.state == reference::State::done),
          "not done where the reference is");
  REQUIRE(chunked.malformed == (expected.state == reference::State::wrong),
          "not malformed where the reference says so");
  REQUIRE(chunked.content == expected.content, "another content");
  if (!chunked.malformed) {
    REQUIRE(chunked.taken == expected.size, "another end");
  }

  const auto length = std::min<std::size_t>(seed, bytes.size());
  const auto counted = feed_in_all_ways(Framing(Framing::Mode::length, seed),
                                        bytes.substr(0, size - 1), seed);
  REQUIRE(counted.content == bytes.substr(0, length), "another content");
  REQUIRE(counted.done == (bytes.size() >= seed), "another end");

  Framing rest(Framing::Mode::until_close);
  std::string content;
  REQUIRE(rest.take(bytes, &content) == bytes.size() && content == bytes,
          "all there is was not taken");
  REQUIRE(!rest.done(), "done before the end");
  rest.close();
  REQUIRE(rest.done() && rest.take(bytes) == 0, "not done at the end");
  return 0;
}
