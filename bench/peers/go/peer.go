// The RPC with amqp091-go: one connection, a channel and a goroutine for each worker. Go sets TCP_NODELAY by itself.
// See ../README.md for the arguments.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func fib(n int) int {
	if n < 2 {
		return n
	}
	return fib(n-1) + fib(n-2)
}

func work(channel *amqp.Channel, requests <-chan amqp.Delivery) {
	for request := range requests {
		n := must(strconv.Atoi(string(request.Body)))
		reply := amqp.Publishing{
			ContentType:   "text/plain",
			CorrelationId: request.CorrelationId,
			Body:          []byte(strconv.Itoa(fib(n))),
		}
		must(0, channel.PublishWithContext(context.Background(), "", request.ReplyTo, false, false, reply))
		must(0, request.Ack(false))
	}
	log.Fatal("the channel is closed")
}

func server(url, queue string, workers int) {
	connection := must(amqp.Dial(url))
	for i := 0; i < workers; i++ {
		channel := must(connection.Channel())
		must(channel.QueueDeclare(queue, false, false, false, false, nil))
		must(0, channel.Qos(1, 0, false))
		go work(channel, must(channel.Consume(queue, "", false, false, false, false, nil)))
	}
	fmt.Println("ready")
	select {}
}

func run(channel *amqp.Channel, queue, callback string, replies <-chan amqp.Delivery, requests, inFlight int) float64 {
	open := make(map[string]bool)
	begin := time.Now()
	sent := 0
	for answered := 0; answered < requests; answered++ {
		for sent < requests && sent-answered < inFlight {
			id := strconv.Itoa(sent)
			open[id] = true
			request := amqp.Publishing{
				ContentType:   "text/plain",
				CorrelationId: id,
				ReplyTo:       callback,
				Body:          []byte("1"),
			}
			must(0, channel.PublishWithContext(context.Background(), "", queue, false, false, request))
			sent++
		}
		reply, ok := <-replies
		if !ok || !open[reply.CorrelationId] || string(reply.Body) != "1" {
			log.Fatal("a wrong answer")
		}
		delete(open, reply.CorrelationId)
	}
	return time.Since(begin).Seconds()
}

func client(url, queue string, requests, inFlight int) {
	time.AfterFunc(5*time.Minute, func() { log.Fatal("no answer") })
	connection := must(amqp.Dial(url))
	channel := must(connection.Channel())
	callback := must(channel.QueueDeclare("", false, true, true, false, nil)).Name
	replies := must(channel.Consume(callback, "", true, true, false, false, nil))
	run(channel, queue, callback, replies, requests/10+1, inFlight)
	fmt.Printf("%.6f\n", run(channel, queue, callback, replies, requests, inFlight))
}

func main() {
	switch args := os.Args; {
	case len(args) == 5 && args[1] == "server":
		server(args[2], args[3], must(strconv.Atoi(args[4])))
	case len(args) == 6 && args[1] == "client":
		client(args[2], args[3], must(strconv.Atoi(args[4])), must(strconv.Atoi(args[5])))
	default:
		log.Fatal("see bench/peers/README.md")
	}
}
