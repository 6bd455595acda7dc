// Where a body ends, as Framing finds it, must not depend on how its bytes are
// split, and must be where the reference says. What goes on of a target's body
// must be strict HTTP.

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

// What is sent on of a body whose superfluous blanks are erased.
template <typename Next>
std::string sent_on(Framing framing, std::string_view bytes, Next next) {
  std::string buffer, sent;
  while (!framing.done() && !framing.malformed() &&
         !(bytes.empty() && buffer.empty())) {
    const auto portion = bytes.substr(0, next());
    buffer += portion;
    bytes.remove_prefix(portion.size());
    for (;;) {
      const auto taken = framing.take(buffer);
      sent += buffer.substr(0, taken);
      buffer.erase(0, taken);
      if (!framing.at_superfluous_blank()) { break; }
      REQUIRE(!buffer.empty() && (buffer[0] == ' ' || buffer[0] == '\t'),
              "no blank where one is superfluous");
      buffer.erase(0, 1);
    }
  }
  return sent;
}

void compare(const Result &result, const reference::Decoded &expected) {
  REQUIRE(result.done == (expected.state == reference::State::done),
          "not done where the reference is");
  REQUIRE(result.malformed == (expected.state == reference::State::wrong),
          "not malformed where the reference says so");
  REQUIRE(result.content == expected.content, "another content");
  if (!result.malformed) {
    REQUIRE(result.taken == expected.size, "another end");
  }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  if (size < 1 || size > WARMPROXY_MAX_HEAD_SIZE) { return 0; }
  const unsigned seed = data[0];
  const std::string_view bytes(reinterpret_cast<const char *>(data) + 1,
                               size - 1);

  const auto chunked =
      feed_in_all_ways(Framing(Framing::Mode::chunked), bytes, seed);
  compare(chunked, reference::chunked(bytes));

  const auto forgiving = Framing::forgiving_chunked();
  const auto repaired = feed_in_all_ways(forgiving, bytes, seed);
  const auto expected = reference::chunked(bytes, true);
  compare(repaired, expected);
  if (repaired.done) {
    reference::Portions portions(seed);
    const auto sent =
        sent_on(forgiving, bytes, [&] { return portions.next(); });
    REQUIRE(sent == expected.sent_on, "something else is sent on");
    REQUIRE(sent == sent_on(forgiving, bytes, [] { return 1; }),
            "byte by byte something else is sent on");
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
