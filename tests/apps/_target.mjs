// A typical Node.js application: Express with sessions, uploads, compression
// and an event stream, and WebSockets.

import { createHash } from 'node:crypto';
import path from 'node:path';
import { npm } from './_support.mjs';

const express = npm('express');
const { WebSocketServer } = npm('ws');

const app = express();
app.set('trust proxy', true);

app.get('/', (request, response) => response.send('<!doctype html><p>home'));

// Reports the request as it arrived.
app.use('/seen', (request, response) => {
  const hash = createHash('sha256');
  let length = 0;
  request.on('data', (part) => { length += part.length; hash.update(part); });
  request.on('end', () => response.json({
    method : request.method,
    url : request.originalUrl,
    version : request.httpVersion,
    headers : request.rawHeaders,
    trailers : request.rawTrailers,
    length,
    sha256 : hash.digest('hex')
  }));
});

app.get('/believed', (request, response) => response.json({
  ip : request.ip,
  ips : request.ips,
  protocol : request.protocol,
  host : request.host
}));

app.use('/packed', npm('compression')({ threshold : 0 }), (request, response) => {
  response.type('html').send('<p>the same again</p>'.repeat(2000));
});

app.get('/cookies', (request, response) => {
  response.setHeader('Set-Cookie', [
    'a=1; Path=/; Expires=Wed, 09 Jun 2100 10:18:14 GMT', 'b=%20%0D%0A; Path=/',
    'a=1; Path=/two', 'c="quoted; not"'
  ]);
  response.send('four');
});

app.use(npm('express-session')({
  secret : 'not secret',
  resave : false,
  saveUninitialized : false
}));
app.post('/login', express.urlencoded({ extended : true }), (request, response) => {
  request.session.name = request.body.name;
  response.redirect(303, '/me');
});
app.get('/me', (request, response) => request.session.name
    ? response.json({ name : request.session.name })
    : response.sendStatus(401));

app.post('/json', express.json({ limit : '20mb' }),
         (request, response) => response.json(request.body));

const upload = npm('multer')({ limits : { fileSize : 64 << 20 } });
app.post('/upload', upload.any(), (request, response) => response.json({
  fields : request.body,
  files : request.files.map((file) => ({
    field : file.fieldname,
    name : file.originalname,
    type : file.mimetype,
    size : file.size,
    sha256 : createHash('sha256').update(file.buffer).digest('hex')
  }))
}));

// Responds to each part of the body before the next one arrives.
app.post('/duplex', (request, response) => {
  response.flushHeaders();
  request.on('data', (part) => response.write(`got ${part}\n`));
  request.on('end', () => response.end('all\n'));
});

app.post('/refused', (request, response) => {
  response.status(413).set('Connection', 'close').send('too much');
});

// The second event is sent upon a request for /release.
const waiting = new Map();
app.get('/events', (request, response) => {
  response.type('text/event-stream').set('Cache-Control', 'no-cache');
  response.write('id: 1\ndata: first\n\n');
  waiting.set(request.query.name, () => {
    response.write('id: 2\nevent: named\ndata: two\ndata: lines\n\n');
    response.end();
  });
  response.on('close', () => waiting.delete(request.query.name));
});
app.get('/waiting', (request, response) => response.json([ ...waiting.keys() ]));
app.get('/release', (request, response) => {
  waiting.get(request.query.name)?.();
  response.sendStatus(204);
});

app.get('/early', (request, response) => {
  response.writeEarlyHints({ link : '</style.css>; rel=preload; as=style' });
  response.writeProcessing();
  response.send('late');
});

app.get('/trailers', (request, response) => {
  response.set('Trailer', 'X-Sum');
  response.write('body');
  response.addTrailers({ 'X-Sum' : createHash('md5').update('body').digest('hex') });
  response.end();
});

app.get('/odd', (request, response) => {
  response.setHeader('x-lower', 'a');
  response.setHeader('X-UPPER', 'b');
  response.setHeader('X-Percent', 'a=%20b; c=%0D%0A');
  response.setHeader('X-Latin', 'caf\xe9');
  response.setHeader('X-Long', 'v'.repeat(8000));
  response.setHeader('X-Twice', [ '1', '2', '1' ]);
  response.setHeader('X-Empty', '');
  response.sendDate = false;
  response.end('odd');
});

app.get('/bare', (request, response) => {
  response.sendDate = false;
  response.removeHeader('X-Powered-By');
  response.writeHead(Number(request.query.status || 200), request.query.reason || 'Fine');
  response.end();
});

app.get('/cut', (request, response) => {
  response.set('Content-Length', '1000');
  response.write('only this');
  setImmediate(() => response.socket.destroy());
});

app.get('/own-cors', (request, response) => {
  response.set('Access-Control-Allow-Origin', 'https://only.example');
  response.set('Access-Control-Allow-Methods', 'GET');
  response.send('mine');
});

app.all('/script-by-type', (request, response) => {
  response.type('text/javascript').set('Cache-Control', 'max-age=5');
  if (request.query.cache) { response.set('Cache-Control', request.query.cache); }
  if (request.query.cookie) { response.set('Set-Cookie', 'a=1'); }
  response.send('1');
});

app.use('/files', express.static(process.env.FILES || '.'));

const server = app.listen(process.env.PORT, '127.0.0.1');

server.on('checkContinue', (request, response) => {
  if (request.headers['x-refuse']) {
    response.writeHead(417);
    response.end('no');
  } else {
    response.writeContinue();
    app(request, response);
  }
});

// ----------------------------------------------------------------- upgrades

const sockets = new WebSocketServer({
  noServer : true,
  maxPayload : 64 << 20,
  perMessageDeflate : { threshold : 0 },
  handleProtocols : (offered) => offered.has('second') ? 'second' : false
});

sockets.on('connection', (socket, request) => {
  const { searchParams } = new URL(request.url, 'http://any');
  if (searchParams.has('close')) {
    return socket.close(Number(searchParams.get('close')), 'as asked');
  }
  if (searchParams.has('cut')) { return socket.terminate(); }
  if (searchParams.has('ping')) { socket.ping('are you there'); }
  socket.on('pong', (data) => socket.send(`pong: ${data}`));
  socket.on('error', () => {});
  socket.on('message', (data, binary) => socket.send(data, { binary }));
});

server.on('upgrade', (request, socket, head) => {
  const { pathname } = new URL(request.url, 'http://any');
  if (pathname === '/socket') {
    sockets.handleUpgrade(request, socket, head,
                          (made) => sockets.emit('connection', made, request));
  } else if (pathname === '/until-end') {
    // Not WebSocket: after the client's half-close, reports how much arrived.
    socket.write('HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\n'
                 + 'Upgrade: until-end\r\n\r\nhello ');
    let length = head.length;
    socket.on('data', (part) => length += part.length);
    socket.on('end', () => socket.end(`got ${length}`));
    socket.on('error', () => {});
  } else {
    socket.end('HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n'
               + 'Content-Length: 9\r\nWWW-Authenticate: Basic\r\n\r\nnot today');
  }
});
