// A server of any bodies, with amqplib: the reply is the request in upper case, byte by byte, with its content type
// and headers.
//
// Usage: upper_server.js URL QUEUE

const amqp = require('amqplib');

const upper = (byte) => (byte >= 97 && byte <= 122 ? byte - 32 : byte);

async function main(url, queue) {
  // Otherwise replies wait for each other's acknowledgement, 40 ms each.
  const connection = await amqp.connect(url, { noDelay: true });
  const channel = await connection.createChannel();
  await channel.assertQueue(queue, { durable: false });
  channel.prefetch(64);
  await channel.consume(queue, (request) => {
    const { replyTo, correlationId, contentType, headers } = request.properties;
    channel.sendToQueue(replyTo, request.content.map(upper), { correlationId, contentType, headers });
    channel.ack(request);
  });
  console.log(' [x] Awaiting RPC requests');
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
