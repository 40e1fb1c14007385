// Tutorial six (RPC) in Go with amqp091-go: the server and the client of the benchmark.
//
//	peer server --url URL --queue Q --workers W --prefetch P
//	peer client --url URL --queue Q --requests N --warmup M --concurrency C --argument n
//
// What makes it fast:
//   - The library flushes after each frame: four system calls for a reply and its ack. It lets one
//     bring the socket, though, so ours gathers what belongs together and writes it once.
//   - Go sets TCP_NODELAY on its own.
//   - The server has one connection, and a goroutine with a channel of its own for each worker.
//   - All goroutines share one thread. Each delivery passes through two of the library's; between
//     threads, that takes about twice the CPU time. (It suits small n: fib computes in one thread.)
//   - On one thread, to yield before writing lets the other goroutines add what they have.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"runtime"
	"sort"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// A reply that takes longer will not come.
const replyTimeout = 60 * time.Second

const contentType = "text/plain"

var (
	url         = flag.String("url", "", "")
	queue       = flag.String("queue", "", "")
	workers     = flag.Int("workers", 0, "")
	prefetch    = flag.Int("prefetch", 0, "")
	requests    = flag.Int("requests", 0, "")
	warmup      = flag.Int("warmup", 0, "")
	concurrency = flag.Int("concurrency", 0, "")
	argument    = flag.Int("argument", 0, "")
)

func main() {
	if len(os.Args) < 2 {
		die("usage", "see the head of peer.go")
	}
	flag.CommandLine.Parse(os.Args[2:])
	runtime.GOMAXPROCS(1)
	switch os.Args[1] {
	case "server":
		server()
	case "client":
		os.Exit(client())
	default:
		die(os.Args[1], "neither server nor client")
	}
}

func die(what string, why interface{}) {
	fmt.Fprintf(os.Stderr, "peer: %s: %v\n", what, why)
	os.Exit(1)
}

func check(what string, err error) {
	if err != nil {
		die(what, err)
	}
}

// The tutorial's recursion, slow on purpose.
func fib(n int) uint64 {
	if n < 2 {
		return uint64(n)
	}
	return fib(n-1) + fib(n-2)
}

// A socket that, while somebody holds it, gathers what is written. Held by nobody, it is a socket
// like any other: the handshake and heartbeats need not know of it.
type gatheringConn struct {
	net.Conn
	mutex    sync.Mutex
	holders  int
	gathered []byte
}

func (c *gatheringConn) Write(bytes []byte) (int, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.holders == 0 {
		return c.Conn.Write(bytes)
	}
	c.gathered = append(c.gathered, bytes...)
	return len(bytes), nil
}

func (c *gatheringConn) hold() {
	c.mutex.Lock()
	c.holders++
	c.mutex.Unlock()
}

// Writes all that is gathered, other holders' included: nobody waits for somebody else's release.
func (c *gatheringConn) release() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.holders--
	if len(c.gathered) > 0 {
		_, err := c.Conn.Write(c.gathered)
		check("write", err)
		c.gathered = c.gathered[:0]
	}
}

func connect() (*amqp.Connection, *gatheringConn) {
	socket := &gatheringConn{}
	dial := func(network, address string) (net.Conn, error) {
		var err error
		socket.Conn, err = net.DialTimeout(network, address, 30*time.Second)
		return socket, err
	}
	connection, err := amqp.DialConfig(*url, amqp.Config{Dial: dial})
	check("connect", err)
	return connection, socket
}

func openChannel(connection *amqp.Connection) *amqp.Channel {
	channel, err := connection.Channel()
	check("open a channel", err)
	return channel
}

func publish(channel *amqp.Channel, routingKey string, message amqp.Publishing) {
	check("publish", channel.PublishWithContext(
		context.Background(), "", routingKey, false, false, message))
}

// --- Server --------------------------------------------------------------------------------------

func server() {
	connection, socket := connect()
	for i := 0; i < *workers; i++ {
		channel := openChannel(connection)
		_, err := channel.QueueDeclare(*queue, false, false, false, false, nil)
		check("declare the queue", err)
		check("set the prefetch", channel.Qos(*prefetch, 0, false))
		deliveries, err := channel.Consume(*queue, "", false, false, false, false, nil)
		check("consume", err)
		go work(channel, socket, deliveries)
	}
	fmt.Println(" [x] Awaiting RPC requests")
	select {}
}

func work(channel *amqp.Channel, socket *gatheringConn, deliveries <-chan amqp.Delivery) {
	for request := range deliveries {
		n, err := strconv.Atoi(string(request.Body))
		check("request", err)
		answer := strconv.AppendUint(nil, fib(n), 10)
		socket.hold()
		publish(channel, request.ReplyTo, amqp.Publishing{
			ContentType:   contentType,
			CorrelationId: request.CorrelationId,
			Body:          answer,
		})
		check("ack", request.Ack(false))
		runtime.Gosched()
		socket.release()
	}
	die("worker", "the channel is gone")
}

// --- Client --------------------------------------------------------------------------------------

type caller struct {
	channel  *amqp.Channel
	socket   *gatheringConn
	callback string
	replies  <-chan amqp.Delivery
	body     []byte
	expected string
	nextID   int // correlation ids are this number in decimal, over all runs
}

type run struct {
	ok        int
	seconds   float64
	latencies []time.Duration
}

// Makes `count` calls, `concurrency` at a time.
func (c *caller) call(count int) run {
	firstID := c.nextID
	sent := make([]time.Time, 0, count) // by id; zero once answered
	result := run{latencies: make([]time.Duration, 0, count)}
	began := time.Now()
	ended := began

	// A reply that is nobody's, or a call's second, is not counted.
	take := func(reply amqp.Delivery) {
		id, err := strconv.Atoi(reply.CorrelationId)
		at := id - firstID
		if err != nil || at < 0 || at >= len(sent) || sent[at].IsZero() {
			return
		}
		ended = time.Now()
		result.latencies = append(result.latencies, ended.Sub(sent[at]))
		sent[at] = time.Time{}
		if string(reply.Body) == c.expected {
			result.ok++
		}
	}

	timeout := time.NewTimer(replyTimeout)
	for len(result.latencies) < count {
		c.socket.hold()
		for len(sent) < count && len(sent)-len(result.latencies) < *concurrency {
			sent = append(sent, time.Now())
			publish(c.channel, *queue, amqp.Publishing{
				ContentType:   contentType,
				CorrelationId: strconv.Itoa(c.nextID),
				ReplyTo:       c.callback,
				Body:          c.body,
			})
			c.nextID++
		}
		c.socket.release()

		timeout.Reset(replyTimeout)
		select {
		case reply, open := <-c.replies:
			if !open {
				die("client", "the connection is gone")
			}
			take(reply)
		case <-timeout.C:
			die("client", "no reply came in time")
		}
		// With it all that have come in, so that the next requests leave together, too.
		for yielded := false; ; {
			select {
			case reply := <-c.replies:
				take(reply)
				yielded = false
				continue
			default:
			}
			if yielded {
				break
			}
			runtime.Gosched()
			yielded = true
		}
	}
	result.seconds = ended.Sub(began).Seconds()
	return result
}

func client() int {
	connection, socket := connect()
	channel := openChannel(connection)
	callback, err := channel.QueueDeclare("", false, true, true, false, nil)
	check("declare the callback queue", err)
	replies, err := channel.Consume(callback.Name, "", true, true, false, false, nil)
	check("consume", err)
	c := caller{
		channel:  channel,
		socket:   socket,
		callback: callback.Name,
		replies:  replies,
		body:     []byte(strconv.Itoa(*argument)),
		expected: strconv.FormatUint(fib(*argument), 10),
	}
	c.call(*warmup)
	result := c.call(*requests)

	sort.Slice(result.latencies, func(i, j int) bool {
		return result.latencies[i] < result.latencies[j]
	})
	quantile := func(percent int) float64 {
		return result.latencies[*requests*percent/100].Seconds() * 1e3
	}
	fmt.Printf("{\"requests\":%d,\"ok\":%d,\"wrong\":%d,\"seconds\":%.6f,\"rate\":%.1f,"+
		"\"latency_ms\":{\"p50\":%.4f,\"p99\":%.4f}}\n",
		*requests, result.ok, *requests-result.ok, result.seconds,
		float64(*requests)/result.seconds, quantile(50), quantile(99))
	if result.ok != *requests {
		return 1
	}
	return 0
}
