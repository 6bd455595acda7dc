// Artalk behind warmproxy, as a Vercel function or anywhere else. Edit the
// three lines, or leave them and set WARMPROXY_BINARY, _ARGS and _TARGET_PORT.
#include "warmproxy.hpp"

int main(int argc, char **argv) {
  warmproxy::Options options;
  options.binary = "./artalk";
  options.args = {"server", "-w", "."};
  options.target_port = 23366;
  return warmproxy::serve(warmproxy::options_from_env(options), argc, argv);
}
