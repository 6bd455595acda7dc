// A second HTTP/1.1 parser for the fuzzers to compare with: written in the
// plainest way, with copies and searches, and sharing no code with
// warmproxy.hpp. It follows RFC 9112, less what we refuse.

#ifndef WARMPROXY_TESTS_FUZZ_REFERENCE_HPP
#define WARMPROXY_TESTS_FUZZ_REFERENCE_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

// Ends the fuzzer, which keeps the input.
#define REQUIRE(condition, what)                                               \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, what);           \
      std::abort();                                                            \
    }                                                                          \
  } while (false)

namespace reference {

using Bytes = std::string_view;

// Bytes of a head, of a chunk's size line, or of a line of a trailer.
constexpr std::size_t max_head = 65536;

// Sizes of portions, small and large, derived from `seed`.
class Portions {
public:
  explicit Portions(unsigned seed) : state_(seed) {}
  std::size_t next() {
    state_ = state_ * 1103515245u + 12345u;
    const auto n = (state_ >> 16) & 0xff;
    return n < 128 ? 1 + n % 3 : n < 224 ? 1 + n % 32 : 1 + n * 7;
  }

private:
  unsigned state_;
};

inline std::string lower(Bytes text) {
  std::string out(text);
  for (auto &c : out) {
    if (c >= 'A' && c <= 'Z') { c = static_cast<char>(c - 'A' + 'a'); }
  }
  return out;
}

inline bool blank(char c) { return c == ' ' || c == '\t'; }

inline Bytes stripped(Bytes text) {
  while (!text.empty() && blank(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && blank(text.back())) {
    text.remove_suffix(1);
  }
  return text;
}

// The elements of a comma-separated list, in lower case.
inline std::vector<std::string> elements(Bytes list) {
  std::vector<std::string> all;
  std::string element;
  for (const char c : std::string(list) + ",") {
    if (c != ',') {
      element += c;
      continue;
    }
    const auto bare = stripped(element);
    if (!bare.empty()) { all.push_back(lower(bare)); }
    element.clear();
  }
  return all;
}

inline bool has(const std::vector<std::string> &list, Bytes element) {
  for (const auto &e : list) {
    if (e == element) { return true; }
  }
  return false;
}

// No control character but the tab.
inline bool clean(Bytes text) {
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte < 32 && byte != 9) || byte == 127) { return false; }
  }
  return true;
}

// What a target may put into a field value all the same.
inline bool harmless(Bytes text) {
  return text.find_first_of(Bytes("\0\r\n", 3)) == Bytes::npos;
}

inline bool token_chars(Bytes text) {
  return text.find_first_not_of(
             "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
             "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == Bytes::npos;
}
inline bool token(Bytes text) { return !text.empty() && token_chars(text); }

struct Line {
  std::string name, value, raw; // `name` in lower case
};

struct Body {
  enum Kind { none, length, chunked, until_close };
  Kind kind = none;
  std::uint64_t size = 0;
};

struct Head {
  std::string method, target, authority; // of a request
  int status = 0;                        // of a response
  std::string reason;                    // all behind its version
  int minor = 1;
  std::vector<Line> lines;
  Body body;

  std::vector<std::string> values(Bytes name) const {
    std::vector<std::string> all;
    for (const auto &line : lines) {
      if (line.name == name) { all.push_back(line.value); }
    }
    return all;
  }
  // The elements of all these lines.
  std::vector<std::string> list(Bytes name) const {
    std::vector<std::string> all;
    for (const auto &value : values(name)) {
      for (const auto &element : elements(value)) {
        all.push_back(element);
      }
    }
    return all;
  }
  bool has_field(Bytes name) const { return index(name) < lines.size(); }
  bool keep_alive() const {
    const auto options = list("connection");
    return !has(options, "close") && (minor == 1 || has(options, "keep-alive"));
  }
  // To something else than HTTP/2 or TLS.
  bool upgrade() const {
    bool other = false;
    for (const auto &protocol : list("upgrade")) {
      other |= protocol != "h2c" && protocol.substr(0, 4) != "tls/";
    }
    return minor == 1 && has(list("connection"), "upgrade") && other;
  }
  void remove(Bytes name, std::size_t but = std::size_t(-1)) {
    std::vector<Line> rest;
    for (std::size_t i = 0; i < lines.size(); ++i) {
      if (i == but || lines[i].name != name) { rest.push_back(lines[i]); }
    }
    lines = rest;
  }
  std::size_t index(Bytes name) const {
    std::size_t i = 0;
    while (i < lines.size() && lines[i].name != name) {
      ++i;
    }
    return i;
  }
};

// As it is sent on: the space is required even without a reason phrase (RFC
// 9112, section 4).
inline std::string sent_reason(const std::string &reason) {
  return reason.size() == 3 ? reason + " " : reason;
}

// Up to and with the first empty line; empty: there is none. Where `lenient`,
// lines may end in LF alone.
inline Bytes head_of(Bytes bytes, bool lenient) {
  auto end = bytes.find("\r\n\r\n");
  auto size = end == Bytes::npos ? 0 : end + 4;
  if (lenient) {
    for (const Bytes mark : {"\n\n", "\n\r\n"}) {
      end = bytes.find(mark);
      if (end != Bytes::npos && (size == 0 || end + mark.size() < size)) {
        size = end + mark.size();
      }
    }
  }
  return bytes.substr(0, size);
}

// The lines of a head without their ends and without the empty one. None if a
// line does not end properly or, unless `lenient`, contains what it must not.
inline std::vector<std::string> lines_of(Bytes head, bool lenient) {
  std::vector<std::string> lines;
  std::string line;
  for (const char c : head) {
    if (c != '\n') {
      line += c;
      continue;
    }
    if (!line.empty() && line.back() == '\r') {
      line.pop_back();
    } else if (!lenient) {
      return {};
    }
    if (!lenient && !clean(line)) { return {}; }
    lines.push_back(line);
    line.clear();
  }
  if (lines.empty() || !lines.back().empty() || !line.empty()) { return {}; }
  lines.pop_back();
  return lines;
}

inline bool read_lines(const std::vector<std::string> &lines, Head &head) {
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const auto &raw = lines[i];
    const auto colon = raw.find(':');
    if (colon == std::string::npos || !token(Bytes(raw).substr(0, colon))) {
      return false;
    }
    head.lines.push_back({lower(Bytes(raw).substr(0, colon)),
                          std::string(stripped(Bytes(raw).substr(colon + 1))),
                          raw});
  }
  return head.lines.size() <= 1000 && head.list("connection").size() <= 100;
}

// Joins folded lines, removes blanks before colons, and leaves out lines whose
// name is no token.
inline void repair_lines(std::vector<std::string> &lines) {
  std::vector<std::string> joined;
  for (std::size_t i = 1; i < lines.size(); ++i) {
    if (i == 1 || !blank(lines[i][0])) {
      joined.push_back(lines[i]);
    } else if (const auto more = stripped(lines[i]); !more.empty()) {
      auto &line = joined.back();
      while (!line.empty() && blank(line.back())) {
        line.pop_back();
      }
      line += " " + std::string(more);
    }
  }
  lines.resize(1);
  for (const auto &line : joined) {
    const auto colon = line.find(':');
    auto end = colon == std::string::npos ? 0 : colon;
    while (end > 0 && blank(line[end - 1])) {
      --end;
    }
    if (token(Bytes(line).substr(0, end))) {
      lines.push_back(line.substr(0, end) + line.substr(colon));
    }
  }
}

inline std::optional<std::uint64_t> decimal(Bytes text) {
  if (text.empty() || text.find_first_not_of("0123456789") != Bytes::npos) {
    return {};
  }
  while (text.size() > 1 && text[0] == '0') {
    text.remove_prefix(1);
  }
  const Bytes largest = "18446744073709551615";
  if (text.size() > largest.size() ||
      (text.size() == largest.size() && text > largest)) {
    return {};
  }
  return std::strtoull(std::string(text).c_str(), nullptr, 10);
}

// RFC 9112, section 6.3. False: refused.
inline bool read_framing(bool request, Head &head) {
  const auto codings = head.values("transfer-encoding");
  const auto lengths = head.values("content-length");
  for (const auto &length : lengths) {
    if (!decimal(length) || decimal(length) != decimal(lengths[0])) {
      return false;
    }
  }
  if (!codings.empty()) {
    if (codings.size() > 1 || lower(codings[0]) != "chunked" ||
        head.minor == 0 || (request && !lengths.empty())) {
      return false;
    }
    head.body.kind = Body::chunked;
  } else if (!lengths.empty()) {
    if (request && lengths.size() > 1) { return false; }
    head.body = {Body::length, *decimal(lengths[0])};
  } else {
    head.body.kind = request ? Body::none : Body::until_close;
  }
  return true;
}

// The same of a target, of which more is understood; what is superfluous then
// is removed.
inline bool read_lenient_framing(Head &head) {
  bool chunked = false, exact = true;
  const auto codings = head.values("transfer-encoding");
  for (const auto &coding : codings) {
    exact = exact && codings.size() == 1 && lower(coding) == "chunked";
    for (const auto &element : elements(coding)) {
      if (element != "chunked" && element != "identity") { return false; }
      chunked |= element == "chunked";
    }
  }
  if (chunked && head.minor == 0) { return false; }
  if (!exact) {
    const auto first = head.index("transfer-encoding");
    head.lines[first] = {"transfer-encoding", "chunked",
                         "Transfer-Encoding: chunked"};
    head.remove("transfer-encoding", chunked ? first : std::size_t(-1));
  }
  // Several lines are one list (RFC 9110, section 5.3), and empty elements of a
  // list are ignored (section 5.6.1), but it has to begin with a number.
  std::vector<std::string> lengths;
  for (const auto &value : head.values("content-length")) {
    if (lengths.empty() && (value.empty() || value[0] == ',')) { return false; }
    for (const auto &element : elements(value)) {
      if (!decimal(element)) { return false; }
      lengths.push_back(element);
      if (decimal(element) != decimal(lengths[0])) { return false; }
    }
  }
  if (!lengths.empty() &&
      head.values("content-length") != std::vector<std::string>{lengths[0]}) {
    const auto first = head.index("content-length");
    auto &line = head.lines[first];
    const auto from = line.raw.find(lengths[0], line.raw.find(':'));
    line = {line.name, lengths[0],
            line.raw.substr(0, from + lengths[0].size())};
    head.remove("content-length", first);
  }
  if (chunked) { head.remove("content-length"); }
  head.body.kind = chunked            ? Body::chunked
                   : !lengths.empty() ? Body::length
                                      : Body::until_close;
  if (!lengths.empty() && !chunked) { head.body.size = *decimal(lengths[0]); }
  return true;
}

// Host, or what is between "//" and the path.
inline bool authority(Bytes text) {
  return text.find_first_of(" \t,/?#@\\<>\"") == Bytes::npos;
}

// RFC 3986, section 3.1.
inline bool scheme(Bytes text) {
  const auto name = lower(text);
  return !name.empty() && name[0] >= 'a' && name[0] <= 'z' &&
         name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789+-.") ==
             std::string::npos;
}

inline std::optional<Head> request(Bytes text) {
  const auto lines = lines_of(text, false);
  if (lines.empty()) { return {}; }
  Head head;
  const auto &first = lines[0];
  const auto a = first.find(' ');
  const auto b = a == std::string::npos ? a : first.find(' ', a + 1);
  if (b == std::string::npos || first.find(' ', b + 1) != std::string::npos) {
    return {};
  }
  head.method = first.substr(0, a);
  head.target = first.substr(a + 1, b - a - 1);
  const auto version = first.substr(b + 1);
  if (version != "HTTP/1.1" && version != "HTTP/1.0") { return {}; }
  head.minor = version == "HTTP/1.1" ? 1 : 0;
  if (!token(head.method) || head.method == "CONNECT" ||
      head.target.find_first_of("\t#") != std::string::npos ||
      !read_lines(lines, head)) {
    return {};
  }
  const auto hosts = head.values("host");
  if (hosts.size() > 1 || (hosts.empty() && head.minor == 1) ||
      (!hosts.empty() && !authority(hosts[0]))) {
    return {};
  }
  if (head.target.substr(0, 1) == "/" ||
      (head.target == "*" && head.method == "OPTIONS")) {
    return read_framing(true, head) ? std::optional<Head>(head) : std::nullopt;
  }
  const auto mark = head.target.find("://");
  if (mark == std::string::npos || !scheme(head.target.substr(0, mark))) {
    return {};
  }
  const auto skip = mark + 3;
  const auto end =
      std::min(head.target.find_first_of("/?", skip), head.target.size());
  head.authority = head.target.substr(skip, end - skip);
  head.target.erase(0, end);
  if (head.target.empty() && head.method == "OPTIONS") {
    head.target = "*";
  } else if (head.target.substr(0, 1) != "/") {
    head.target = "/" + head.target;
  }
  if (head.authority.empty() || !authority(head.authority)) { return {}; }
  if (!read_framing(true, head)) { return {}; }
  return head;
}

// `method` is that of the request. Where `lenient`, what a target sends is
// repaired; else it has to be in order as it is.
inline std::optional<Head> response(Bytes text, Bytes method, bool lenient) {
  if (lenient && (text.substr(0, 1) == "\n" || text.substr(0, 2) == "\r\n")) {
    text.remove_prefix(text[0] == '\n' ? 1 : 2);
  }
  if (!lenient && text.find("\n") != text.find("\r\n") + 1) { return {}; }
  auto lines = lines_of(text, true);
  if (lines.empty()) { return {}; }
  if (lenient) { repair_lines(lines); }
  if (!std::all_of(lines.begin(), lines.end(), harmless)) { return {}; }
  Head head;
  const auto &first = lines[0];
  const auto version = first.substr(0, 9);
  if (version != "HTTP/1.1 " && version != "HTTP/1.0 ") { return {}; }
  head.minor = version == "HTTP/1.1 " ? 1 : 0;
  head.reason = first.substr(9);
  const auto code = decimal(head.reason.substr(0, 3));
  if (head.reason.size() < 3 || !code || *code < 100 || !clean(first) ||
      (head.reason.size() > 3 && head.reason[3] != ' ') ||
      !read_lines(lines, head)) {
    return {};
  }
  head.status = static_cast<int>(*code);
  if (head.status < 200 || head.status == 204) {
    if (lenient) {
      head.remove("transfer-encoding");
      head.remove("content-length");
    }
    return head;
  }
  if (!(lenient ? read_lenient_framing(head) : read_framing(false, head))) {
    return {};
  }
  if (head.status == 304 || method == "HEAD") { head.body = {}; }
  return head;
}

enum class State { more, done, wrong };

// A body as far as it goes: how many of the bytes belong to it, its content,
// and for a chunked one that is done, its chunks without superfluous blanks.
struct Decoded {
  State state = State::more;
  std::size_t size = 0;
  std::string content;
  std::string sent_on = {};
};

// Whether this can be the size line of a chunk, or its beginning. Blanks around
// the size are removed where `forgiving`.
inline bool size_line(std::string &text, bool whole, bool forgiving,
                      std::uint64_t &size) {
  const Bytes hex = "0123456789abcdefABCDEF";
  const auto begin = std::min(text.find_first_not_of(" \t"), text.size());
  const auto end = std::min(text.find_first_not_of(hex, begin), text.size());
  const auto next = std::min(text.find_first_not_of(" \t", end), text.size());
  const auto digits = text.substr(begin, end - begin);
  const auto rest = text.substr(next);
  if (!forgiving && (begin > 0 || next > end)) { return false; }
  auto significant = Bytes(digits);
  while (!significant.empty() && significant[0] == '0') {
    significant.remove_prefix(1);
  }
  if (significant.size() > 16 ||
      (significant.size() == 16 && significant[0] > '7')) {
    return false;
  }
  size = std::strtoull(std::string(significant).c_str(), nullptr, 16);
  text = digits + rest;
  return (!digits.empty() || (!whole && rest.empty())) &&
         (rest.empty() || rest[0] == ';') && clean(rest);
}

// The same for a trailer's line, or the empty one behind them.
inline bool trailer_line(std::string &text, bool whole, bool forgiving) {
  if (text.empty()) { return true; }
  const auto colon = std::min(text.find(':'), text.size());
  auto end = colon;
  while (forgiving && end > 0 && blank(text[end - 1])) {
    --end;
  }
  const auto name = text.substr(0, end), value = text.substr(colon);
  text = name + value;
  return token(name) && (forgiving ? harmless(value) : clean(value)) &&
         (!whole || !value.empty());
}

// RFC 9112, section 7.1.
inline Decoded chunked(Bytes bytes, bool forgiving = false) {
  Decoded out;
  const auto ends = [&out](State state, std::size_t size) {
    out.state = state;
    out.size = size;
    return out;
  };
  // Takes the line at `at`: State::more if its end is still to come, wrong if
  // it cannot become one.
  std::size_t at = 0;
  std::string text;
  const auto line = [&](auto good) {
    const auto end = bytes.find("\r\n", at);
    const auto raw = bytes.substr(at, end == Bytes::npos ? end : end - at);
    text = raw;
    const bool whole =
        end != Bytes::npos || (!text.empty() && text.back() == '\r');
    if (end == Bytes::npos && whole) { text.pop_back(); }
    if (!good(text, whole) || raw.size() > max_head) { return State::wrong; }
    if (end == Bytes::npos) { return State::more; }
    at = end + 2;
    out.sent_on += text + "\r\n";
    return State::done;
  };
  for (;;) {
    std::uint64_t size = 0;
    const auto state = line([&](std::string &t, bool whole) {
      return size_line(t, whole, forgiving, size);
    });
    if (state != State::done) { return ends(state, bytes.size()); }
    if (size == 0) { break; }
    const auto data = bytes.substr(at, size);
    out.content += data;
    at += data.size();
    const auto end = bytes.substr(at, 2);
    if (data.size() < size || end.empty() || end == "\r") {
      return ends(State::more, bytes.size());
    }
    if (end != "\r\n") { return ends(State::wrong, bytes.size()); }
    out.sent_on += std::string(data) + "\r\n";
    at += 2;
  }
  for (;;) {
    const auto state = line([&](std::string &t, bool whole) {
      return trailer_line(t, whole, forgiving);
    });
    if (state != State::done) { return ends(state, bytes.size()); }
    if (text.empty()) { return ends(State::done, at); }
  }
}

// The body that such a head announces. What goes until the end of the
// connection is never done.
inline Decoded body(const Body &body, Bytes bytes, bool forgiving = false) {
  switch (body.kind) {
  case Body::none: return {State::done, 0, {}};
  case Body::chunked: return chunked(bytes, forgiving);
  case Body::length: bytes = bytes.substr(0, body.size); break;
  case Body::until_close: break;
  }
  const bool done = body.kind == Body::length && bytes.size() == body.size;
  return {done ? State::done : State::more, bytes.size(), std::string(bytes)};
}

} // namespace reference

#endif
