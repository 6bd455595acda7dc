// WebSocket conversations, each written down so that one with the target and
// one through warmproxy can be compared.

import { assert, net, noise, npm, sha256, until } from './_support.mjs';

const WebSocket = npm('ws');

/** Opens, lets `script` speak, and gives the record once all is closed. */
export async function talk(port, path, script, options = {}) {
  const record = [];
  const socket = new WebSocket(`ws://127.0.0.1:${port}${path}`,
                               options.protocols || [], {
    perMessageDeflate : false,
    headers : { Host : 'warm.test' },
    ...options
  });
  const brief = (data) => data.length > 200
      ? `${data.length} bytes, ${sha256(data)}`
      : data.toString('latin1');
  let messages = 0;
  socket.on('upgrade', (answer) => {
    const headers = {...answer.headers };
    delete headers.date;
    delete headers['sec-websocket-accept']; // ws has checked it
    record.push([ 'upgrade', answer.statusCode, headers ]);
  });
  socket.on('unexpected-response', (request, answer) => {
    const headers = {...answer.headers };
    delete headers.connection;
    record.push([ 'refused', answer.statusCode, headers ]);
    answer.on('data', (data) => record.push([ 'body', String(data) ]));
    answer.on('end', () => socket.terminate());
  });
  socket.on('error', (error) => record.push([ 'error', error.code || error.message ]));
  socket.on('message', (data, binary) => {
    messages++;
    record.push([ binary ? 'binary' : 'text', brief(data) ]);
  });
  socket.on('ping', (data) => record.push([ 'ping', String(data) ]));
  socket.on('pong', (data) => record.push([ 'pong', String(data) ]));
  const closed = new Promise((done) => socket.on('close', (code, reason) => {
    record.push([ 'close', code, String(reason) ]);
    done();
  }));
  socket.on('open', async () => {
    try {
      await script?.(socket, {
        record,
        messages : (count) => until(`message ${count}`, () => messages >= count),
        kinds : (kind) => until(`a ${kind}`, () => record.some(
            (line) => line[0] === kind))
      });
    } catch (error) {
      record.push([ 'script', error.message ]);
      socket.terminate();
    }
  });
  await closed;
  return record;
}

export async function same_talk(warm, path, script, options) {
  const through = await talk(warm.port, path, script, options); // starts it
  const direct = await talk(warm.target_port, path, script, options);
  assert.deepEqual(through, direct);
  assert.ok(!through.some(([ kind ]) => kind === 'script'),
            JSON.stringify(through));
  return through;
}

/** Text, binary, empty, fragmented, mixed with pings; closed with a code. */
export async function all_kinds(socket, { messages, kinds }) {
  socket.send('text: ü €');
  await messages(1);
  socket.send(Buffer.from([ 0, 1, 254, 255, 10, 13 ]));
  await messages(2);
  socket.send('');
  await messages(3);
  socket.send('in ', { fin : false });
  socket.ping('between');
  socket.send('three ', { fin : false });
  socket.send('parts', { fin : true });
  await messages(4);
  await kinds('pong');
  socket.send(noise(70000));
  await messages(5);
  socket.close(4321, 'enough');
}

/** `count` messages of a megabyte, sent without waiting for their echo. */
export const large = (count) => async (socket, { messages }) => {
  for (let i = 0; i < count; i++) { socket.send(noise(1 << 20, i + 1)); }
  await messages(count);
  socket.close(1000);
};

/** A raw upgrade; gives what came until the other side has ended. */
export function half_open(port, path, bytes) {
  return new Promise((done, fail) => {
    const socket = net.connect({ port, host : '127.0.0.1', allowHalfOpen : true });
    let got = '';
    socket.setTimeout(20000, () => socket.destroy(new Error(`late: ${got}`)));
    socket.on('error', fail);
    // The first bytes follow their head in the same write.
    socket.write(Buffer.concat([
      Buffer.from(`GET ${path} HTTP/1.1\r\nHost: warm.test\r\n`
                  + 'Connection: Upgrade\r\nUpgrade: until-end\r\n\r\n'),
      bytes
    ]));
    socket.end();
    socket.on('data', (data) => got += data);
    socket.on('end', () => { done(got); socket.destroy(); });
  });
}
