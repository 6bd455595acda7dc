// Settings from the environment: each is read as the reference reads it, or
// refused by name, in one line. The input is what /proc/PID/environ shows:
// NAME=VALUE, each ended by a NUL.

#include "../../warmproxy.hpp"

#include "reference.hpp"

#include <algorithm>
#include <map>

namespace {

using warmproxy::Options;
using Words = std::vector<std::string>;
using Variables = std::map<std::string, std::string>;

// XCU 2.2 and 2.6.5: quoting and splitting, without expansions.
std::optional<Words> shell_words(const std::string &text) {
  Words words;
  std::string word;
  bool inside = false;
  std::size_t i = 0;
  const auto closing = [&](char quote) {
    for (auto at = i; at < text.size(); ++at) {
      if (text[at] == quote) { return true; }
      if (text[at] == '\\' && quote == '"') { ++at; }
    }
    return false;
  };
  while (i < text.size()) {
    const char c = text[i++];
    if (c == ' ' || c == '\t' || c == '\n') {
      if (inside) { words.push_back(word); }
      word.clear();
      inside = false;
    } else if (c == '\'') {
      if (!closing('\'')) { return {}; }
      const auto end = text.find('\'', i);
      word += text.substr(i, end - i);
      i = end + 1;
      inside = true;
    } else if (c == '"') {
      if (!closing('"')) { return {}; }
      inside = true;
      for (; text[i] != '"'; ++i) {
        if (text[i] == '\\' && text[i + 1] == '\n') {
          ++i;
        } else if (text[i] == '\\' && std::string("\"\\$`").find(text[i + 1]) !=
                                          std::string::npos) {
          word += text[++i];
        } else {
          word += text[i];
        }
      }
      ++i;
    } else if (c == '\\') {
      if (i == text.size()) { return {}; }
      if (text[i] != '\n') {
        word += text[i];
        inside = true;
      }
      ++i;
    } else {
      word += c;
      inside = true;
    }
  }
  if (inside) { words.push_back(word); }
  return words;
}

std::string in_single_quotes(const Words &words) {
  std::string text;
  for (const auto &word : words) {
    text += " '";
    for (const char c : word) {
      text += c == '\'' ? "'\\''" : std::string(1, c);
    }
    text += "'\n";
  }
  return text;
}

std::string in_double_quotes(const Words &words) {
  std::string text;
  for (const auto &word : words) {
    text += "\t\"";
    for (const char c : word) {
      if (std::string("\"\\$`").find(c) != std::string::npos) { text += '\\'; }
      text += c;
    }
    text += "\" ";
  }
  return text;
}

// Every character for itself; a line break cannot be had so.
std::string behind_backslashes(const Words &words) {
  std::string text;
  for (const auto &word : words) {
    if (word.empty()) { text += "''"; }
    for (const char c : word) {
      text += c == '\n' ? "'\n'" : std::string("\\") + c;
    }
    text += ' ';
  }
  return text;
}

void round_trip(const Words &words) {
  for (const auto quote :
       {in_single_quotes, in_double_quotes, behind_backslashes}) {
    Words again;
    REQUIRE(warmproxy::detail::split_words(quote(words), again),
            "quoted words are refused");
    REQUIRE(again == words, "quoted words are others");
  }
}

std::optional<std::int64_t> milliseconds(const std::string &text) {
  const auto unit = text.find_first_not_of("0123456789");
  const auto number = reference::decimal(text.substr(0, unit));
  if (!number) { return {}; }
  if (unit == std::string::npos) {
    return text == "0" ? std::optional<std::int64_t>(0) : std::nullopt;
  }
  const std::map<std::string, double> units = {
      {"ms", 1}, {"s", 1e3}, {"m", 6e4}, {"h", 3.6e6}, {"d", 8.64e7}};
  const auto factor = units.find(text.substr(unit));
  if (factor == units.end() ||
      static_cast<double>(*number) * factor->second > 1e12) {
    return {};
  }
  return static_cast<std::int64_t>(*number) *
         static_cast<std::int64_t>(factor->second);
}

bool without(const std::string &text, const std::string &characters) {
  return text.find_first_of(characters) == std::string::npos;
}

// What may stand in a request target or a header line.
bool in_a_line(const std::string &text) {
  return reference::clean(text) && without(text, " \t");
}

// What may stand in a request target as it is sent.
bool encoded(const std::string &text) {
  return in_a_line(text) && std::none_of(text.begin(), text.end(), [](char c) {
           return static_cast<unsigned char>(c) >= 0x80;
         });
}

// What browsers send as Origin: no path, no credentials.
bool is_origin(const std::string &text) {
  const auto scheme_end = text.find("://");
  if (scheme_end == std::string::npos) { return text == "*" || text == "null"; }
  const auto host = text.substr(scheme_end + 3);
  return reference::token(text.substr(0, scheme_end)) && !host.empty() &&
         in_a_line(host) && without(host, "/*@");
}

bool read_flag(const std::string &value, bool &flag) {
  const auto word = reference::lower(value);
  flag = word == "1" || word == "true" || word == "yes" || word == "on";
  return flag || word == "0" || word == "false" || word == "no" ||
         word == "off";
}

// Sets what the variable says; false if it cannot be read.
bool expect(const std::string &name, const std::string &value, Options &o) {
  const auto number = reference::decimal(value);
  const auto time = milliseconds(value);
  const auto ms = std::chrono::milliseconds(time.value_or(0));
  const bool path = value.empty() || (value[0] == '/' && encoded(value));
  const bool port = number && *number <= 65535;
  if (name == "WARMPROXY_BINARY") { return o.binary = value, true; }
  if (name == "WARMPROXY_DIRECTORY") { return o.directory = value, true; }
  if (name == "WARMPROXY_SCRATCH") { return o.scratch = value, true; }
  if (name == "WARMPROXY_STRIP_PREFIX") {
    return o.strip_prefix = value, encoded(value);
  }
  if (name == "HOST") { return o.host = value, true; }
  if (name == "WARMPROXY_HEALTH_PATH") { return o.health_path = value, path; }
  if (name == "WARMPROXY_STATUS_PATH") { return o.status_path = value, path; }
  if (name == "WARMPROXY_STARTUP_TIMEOUT") {
    return o.startup_timeout = ms, ms.count() > 0;
  }
  if (name == "WARMPROXY_STOP_TIMEOUT") {
    return o.stop_timeout = ms, time.has_value();
  }
  if (name == "WARMPROXY_IDLE_STOP") {
    return o.idle_stop = ms, time.has_value();
  }
  if (name == "WARMPROXY_BACKGROUND_WORK") {
    return o.background_work = ms, time.has_value();
  }
  if (name == "WARMPROXY_KEEP_ALIVE_TIMEOUT") {
    return o.keep_alive_timeout = ms, time.has_value();
  }
  if (name == "WARMPROXY_WAITING_PAGE_AFTER") {
    return o.waiting_page_after = ms, time.has_value();
  }
  if (name == "WARMPROXY_CDN_CACHE") {
    o.cdn_cache = std::chrono::seconds(ms.count() / 1000);
    return time && ms.count() % 1000 == 0;
  }
  if (name == "WARMPROXY_MAX_CONNECTIONS") {
    o.max_connections = number.value_or(0);
    return o.max_connections > 0;
  }
  if (name == "WARMPROXY_TARGET_PORT" && value == "auto") {
    return o.target_port = warmproxy::any_port, true;
  }
  if (name == "WARMPROXY_TARGET_PORT" && value.find("://") != value.npos) {
    return true; // Kubernetes has set it
  }
  if (name == "WARMPROXY_TARGET_PORT" || name == "PORT") {
    (name == "PORT" ? o.port : o.target_port) =
        static_cast<int>(port ? *number : 0);
    return port;
  }
  if (name == "WARMPROXY_PREWARM") { return read_flag(value, o.prewarm); }
  if (name == "WARMPROXY_TRUST_PROXY") {
    return read_flag(value, o.trust_proxy);
  }
  if (name == "WARMPROXY_CORS_ORIGINS") {
    o.cors_origins.clear();
    for (std::size_t at = 0; at <= value.size();) {
      const auto comma = std::min(value.find(',', at), value.size());
      const auto origin =
          reference::stripped(reference::Bytes(value).substr(at, comma - at));
      if (!origin.empty()) { o.cors_origins.emplace_back(origin); }
      at = comma + 1;
    }
    return std::all_of(o.cors_origins.begin(), o.cors_origins.end(), is_origin);
  }
  if (name == "WARMPROXY_ARGS") {
    const auto words = shell_words(value);
    if (words) {
      o.args = *words;
      round_trip(*words);
    }
    return words.has_value();
  }
  return true; // not one of ours
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  Variables variables;
  const std::string all(reinterpret_cast<const char *>(data), size);
  for (std::size_t at = 0; at < all.size();) {
    const auto end = std::min(all.find('\0', at), all.size());
    const auto equals = all.find('=', at);
    if (equals < end) {
      variables.emplace(all.substr(at, equals - at),
                        all.substr(equals + 1, end - equals - 1));
    }
    at = end + 1;
  }

  for (const auto &variable : variables) {
    const auto warning = warmproxy::detail::unknown_setting(
        variable.first + "=" + variable.second);
    REQUIRE(reference::clean(warning), "a warning is more than one line");
    REQUIRE(warning.empty() || variable.first.compare(0, 10, "WARMPROXY_") == 0,
            "a warning for a variable of somebody else");
  }

  Options defaults;
  defaults.binary = "./artalk";
  defaults.args = {"server", "a b"};
  defaults.target_port = 23366;
  auto expected = defaults;
  if (variables.count("WARMPROXY_BINARY")) { // it brings neither
    expected.args.clear();
    expected.target_port = 0;
  }
  std::string unreadable;
  for (const auto &variable : variables) {
    if (!expect(variable.first, variable.second, expected)) {
      unreadable += variable.first + "\n";
    }
  }

  const auto options =
      warmproxy::detail::read_settings(defaults, [&](const char *name) {
        const auto found = variables.find(name);
        return found == variables.end() ? nullptr : found->second.c_str();
      });
  REQUIRE(options.error.empty() == unreadable.empty(),
          unreadable.empty() ? "the reference reads it all"
                             : "the reference cannot read it");
  if (!unreadable.empty()) {
    const auto name = options.error.substr(0, options.error.find('='));
    REQUIRE((name + "\n").find('\n') == name.size() &&
                ("\n" + unreadable).find("\n" + name + "\n") !=
                    std::string::npos,
            "the error does not name what cannot be read");
    REQUIRE(options.error.find("\"" + variables[name] + "\"") !=
                std::string::npos,
            "the error does not name the value");
    REQUIRE(reference::clean(warmproxy::detail::printable(options.error)),
            "the error is not printed as one line");
    return 0;
  }
  REQUIRE(options.binary == expected.binary, "binary");
  REQUIRE(options.args == expected.args, "args");
  REQUIRE(options.target_port == expected.target_port, "target_port");
  REQUIRE(options.env.empty(), "env");
  REQUIRE(options.directory == expected.directory, "directory");
  REQUIRE(options.scratch == expected.scratch, "scratch");
  REQUIRE(options.strip_prefix == expected.strip_prefix, "strip_prefix");
  REQUIRE(options.prewarm == expected.prewarm, "prewarm");
  REQUIRE(options.health_path == expected.health_path, "health_path");
  REQUIRE(options.startup_timeout == expected.startup_timeout,
          "startup_timeout");
  REQUIRE(options.stop_timeout == expected.stop_timeout, "stop_timeout");
  REQUIRE(options.idle_stop == expected.idle_stop, "idle_stop");
  REQUIRE(options.background_work == expected.background_work,
          "background_work");
  REQUIRE(options.keep_alive_timeout == expected.keep_alive_timeout,
          "keep_alive_timeout");
  REQUIRE(options.trust_proxy == expected.trust_proxy, "trust_proxy");
  REQUIRE(options.host == expected.host, "host");
  REQUIRE(options.port == expected.port, "port");
  REQUIRE(options.max_connections == expected.max_connections,
          "max_connections");
  REQUIRE(options.cors_origins == expected.cors_origins, "cors_origins");
  REQUIRE(options.cdn_cache == expected.cdn_cache, "cdn_cache");
  REQUIRE(options.waiting_page_after == expected.waiting_page_after,
          "waiting_page_after");
  REQUIRE(options.status_path == expected.status_path, "status_path");
  REQUIRE(!options.log, "log");
  // A Proxy refuses nothing else in what could be read.
  const auto error = warmproxy::detail::validate(options);
  const bool any_port_used =
      options.target_port == warmproxy::any_port &&
      std::any_of(options.args.begin(), options.args.end(),
                  [](const std::string &argument) {
                    return argument.find("{port}") != std::string::npos;
                  });
  REQUIRE(error.empty() || options.binary.empty() ||
              !options.directory.empty() || any_port_used,
          "what could be read is refused");
  REQUIRE(!any_port_used || !error.empty(), "{port} has no value");
  return 0;
}
