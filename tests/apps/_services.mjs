// Services that real programs depend on, started for one group on ports of
// their own and stopped with it: PostgreSQL that accepts only TLS, Redis, a
// slow mail server, and Vercel's side of a function.

import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import {
  answers, ask, assert, command, defer, free_port, here, scratch, spawn,
  until
} from './_support.mjs';

const is_root = process.getuid() === 0;

/** Starts a program that is stopped by `signal` at the end of the group. */
function daemon(program, args, signal, options = {}) {
  const child = spawn(program, args, {
    stdio : [ 'ignore', 'pipe', 'pipe' ],
    ...options
  });
  const running = { child, output : '', ended : undefined };
  const collect = (data) => running.output += data;
  child.stdout.on('data', collect);
  child.stderr.on('data', collect);
  const end = new Promise((done) => {
    child.on('error', (error) => {
      running.ended = error.message;
      done();
    });
    child.on('exit', (code, by) => {
      running.ended = by || code;
      done();
    });
  });
  running.stop = async (by = signal) => {
    if (running.ended === undefined) { child.kill(by); }
    const killer = setTimeout(() => child.kill('SIGKILL'), 20000);
    await end;
    clearTimeout(killer);
    return running.ended;
  };
  defer(() => running.stop());
  return running;
}

async function until_it_listens(name, running, port) {
  await until(`${name} listens`, () => {
    if (running.ended !== undefined) {
      throw new Error(`${name} ended with ${running.ended}:\n${running.output}`);
    }
    return answers(port);
  });
}

// ----------------------------------------------------------------- PostgreSQL

/** Debian keeps the server's programs outside PATH, one folder per version. */
function postgres_programs() {
  const versions = '/usr/lib/postgresql';
  const newest = fs.readdirSync(versions).sort((a, b) => b - a)[0];
  return path.join(versions, newest, 'bin');
}

/**
 * A PostgreSQL server with a self-signed certificate that accepts TLS
 * connections with a password only, as Neon does.
 * Gives { host, port, user, password, create(name), query(name, sql), url(name) }.
 */
export async function postgres() {
  const programs = postgres_programs();
  const root = scratch();
  const data = path.join(root, 'data');
  const port = await free_port();
  const server = { host : '127.0.0.1', port, user : 'warm', password : 'p%ss-w@rd' };
  const [ key, certificate, password_file ] =
      [ 'key.pem', 'cert.pem', 'password' ].map((name) => path.join(root, name));
  command('openssl', [
    'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj',
    '/CN=localhost', '-keyout', key, '-out', certificate
  ]);
  fs.writeFileSync(password_file, server.password);
  // PostgreSQL refuses to run as root.
  let as = [];
  if (is_root) {
    command('chown', [ '-R', 'postgres:', root ]);
    as = [ 'setpriv', '--reuid=postgres', '--regid=postgres', '--clear-groups' ];
  }
  const run = (program, ...args) => [ ...as, path.join(programs, program), ...args ];
  const [ initdb, ...init_args ] = run(
      'initdb', '-D', data, '-U', server.user, `--pwfile=${password_file}`,
      '-A', 'scram-sha-256', '-E', 'UTF8', '--locale=C', '--no-sync');
  command(initdb, init_args, { cwd : root });
  fs.writeFileSync(path.join(data, 'pg_hba.conf'),
                   'hostssl all all 127.0.0.1/32 scram-sha-256\n');
  const settings = {
    listen_addresses : server.host, port, unix_socket_directories : '',
    ssl : 'on', ssl_cert_file : certificate, ssl_key_file : key, fsync : 'off'
  };
  const [ program, ...args ] = run(
      'postgres', '-D', data,
      ...Object.entries(settings).flatMap(([ name, value ]) => [ '-c', `${name}=${value}` ]));
  // SIGINT: disconnect the clients and shut down.
  const running = daemon(program, args, 'SIGINT', { cwd : root });
  await until_it_listens('PostgreSQL', running, port);

  server.query = (name, sql, mode = 'require') => command('psql', [
    '-X', '-A', '-t', '-h', server.host, '-p', String(port), '-U', server.user,
    '-d', name, '-c', sql
  ], {
    env : { PATH : process.env.PATH, PGPASSWORD : server.password, PGSSLMODE : mode }
  }).stdout.trim();
  await until('PostgreSQL accepts queries', () => {
    try { return server.query('postgres', 'select 1') === '1'; }
    catch { return false; }
  });
  assert.throws(() => server.query('postgres', 'select 1', 'disable'),
                /no encryption/);
  server.create = (name) => server.query('postgres', `create database ${name}`);
  server.url = (name) => `postgres://${server.user}:${
      encodeURIComponent(server.password)}@${server.host}:${port}/${name}?sslmode=require`;
  return server;
}

// ---------------------------------------------------------------------- Redis

/** A Redis server with a password: { address, password, keys() }. */
export async function redis() {
  const port = await free_port();
  const password = 'redis-password';
  const running = daemon('redis-server', [
    '--port', String(port), '--bind', '127.0.0.1', '--save', '',
    '--appendonly', 'no', '--dir', scratch(), '--requirepass', password
  ], 'SIGTERM');
  await until_it_listens('Redis', running, port);
  return {
    address : `127.0.0.1:${port}`,
    password,
    keys : () => Number(command('redis-cli', [ '-p', String(port), 'dbsize' ], {
      env : { PATH : process.env.PATH, REDISCLI_AUTH : password }
    }).stdout)
  };
}

// ----------------------------------------------------------------------- mail

/**
 * A mail server that takes 150 ms for each reply, as one far away does.
 * Gives { port, mails : [{ to, text, at }] }.
 */
export async function mail_server() {
  const mails = [];
  const server = net.createServer((socket) => {
    let rest = '', mail = { to : [] }, in_data = false;
    const reply = (line) => setTimeout(
        () => socket.writable && socket.write(`${line}\r\n`), 150);
    const line_received = (line) => {
      if (in_data) {
        if (line !== '.') { return mail.text += `${line}\n`; }
        in_data = false;
        mails.push({ ...mail, at : Date.now() });
        mail = { to : [] };
        return reply('250 accepted');
      }
      if (/^RCPT TO:/i.test(line)) { mail.to.push(/<(.*)>/.exec(line)[1]); }
      if (/^DATA/i.test(line)) {
        in_data = true;
        mail.text = '';
        return reply('354 go on');
      }
      if (/^QUIT/i.test(line)) { return reply('221 bye'); }
      reply('250 ok');
    };
    socket.on('error', () => {});
    socket.on('data', (data) => {
      rest += data;
      for (let end; (end = rest.indexOf('\r\n')) >= 0;) {
        const line = rest.slice(0, end);
        rest = rest.slice(end + 2);
        line_received(line);
      }
    });
    reply('220 test');
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  defer(() => server.close());
  return { port : server.address().port, mails };
}

// --------------------------------------------------------------------- Vercel

const repository = path.join(here, '../..');

/**
 * The function that `make vercel` writes for the files in `project`, ready to
 * run: a folder that only root may write to.
 */
export function built_function(project, variables) {
  const env = { ...process.env };
  for (const name of [ 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'BINARY', 'ARGS' ]) {
    delete env[name];
  }
  command('make', [
    '--no-print-directory', '-C', repository, 'vercel', `ROOT=${project}`,
    ...Object.entries(variables).map(([ name, value ]) => `${name}=${value}`)
  ], { env, timeout : 600000 });
  // Traversable for the unprivileged user that the function runs as.
  fs.chmodSync(project, 0o755);
  const folder = path.join(project, '.vercel/output/functions/api.func');
  command('chmod', [ '-R', 'a+rX,a-w', folder ]);
  defer(() => command('chmod', [ '-R', 'u+w', folder ]));
  return folder;
}

/**
 * Runs a program as Vercel runs a function: with the platform's environment,
 * as an unprivileged user if we are root, and with our side of the Unix socket.
 *   folder  the function's folder, with `program` in it
 * Gives { port, ask(request), ends(id), stop() }; `ask` numbers its requests,
 * and its answers have that `id`.
 */
export async function on_vercel(folder, program, env = {}) {
  const place = fs.mkdtempSync(path.join(os.tmpdir(), 'warmproxy-vercel-'));
  defer(() => fs.rmSync(place, { recursive : true, force : true }));
  fs.chmodSync(place, 0o777);
  const socket = path.join(place, 'ipc.sock');
  const messages = [];
  const server = net.createServer((connection) => {
    let rest = '';
    connection.on('error', () => {});
    connection.on('data', (data) => {
      rest += data;
      for (let end; (end = rest.indexOf('\0')) >= 0;) {
        messages.push({ ...JSON.parse(rest.slice(0, end)), at : Date.now() });
        rest = rest.slice(end + 1);
      }
    });
  });
  await new Promise((done) => server.listen(socket, done));
  fs.chmodSync(socket, 0o777);
  defer(() => server.close());

  const as = is_root
      ? [ 'setpriv', '--reuid=65534', '--regid=65534', '--clear-groups' ] : [];
  const [ command_name, ...args ] = [ ...as, program ];
  const running = daemon(command_name, args, 'SIGTERM', {
    cwd : folder,
    env : {
      PATH : process.env.PATH,
      LANG : 'en_US.UTF-8',
      TZ : ':UTC',
      VERCEL : '1',
      VERCEL_ENV : 'production',
      VERCEL_HANDLER : 'executable',
      VERCEL_IPC_PATH : socket,
      // On the platform it is always 3000.
      PORT : String(await free_port()),
      TMPDIR : place,
      HOME : place,
      ...env
    }
  });
  const message = (type, fits = () => true) => until(type, () => {
    const found = messages.find((each) => each.type === type && fits(each.payload));
    if (!found && running.ended !== undefined) {
      throw new Error(`ended with ${running.ended}:\n${running.output}`);
    }
    return found;
  });
  const { payload } = await message('server-started');
  const instance = { port : payload.httpPort, running, messages };
  let last_id = 0;
  instance.ask = async (request = {}) => {
    const id = ++last_id;
    const answer = await ask(instance.port, {
      ...request,
      headers : [
        [ 'x-forwarded-for', '192.0.2.7' ],
        [ 'x-forwarded-host', 'warm.test' ],
        [ 'x-forwarded-proto', 'https' ],
        [ 'x-vercel-internal-invocation-id', `invocation-${id}` ],
        [ 'x-vercel-internal-request-id', String(id) ],
        ...(request.headers || [])
      ]
    });
    return Object.assign(answer, { id, at : Date.now() });
  };
  const is_end_of = (id) => (each) => each.context?.requestId === id;
  instance.end_of = (id) => message('end', is_end_of(id));
  instance.ends = (id) => messages.filter(
      (each) => each.type === 'end' && is_end_of(id)(each.payload)).length;
  instance.stop = async () => {
    const how = await running.stop();
    assert.equal(how, 0, `ended with ${how}:\n${running.output}`);
  };
  return instance;
}

