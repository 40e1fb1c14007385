//! `--metrics`: what a server counts, for Prometheus to read.
//!
//! The library counts most of it anyway; that is asked for when somebody reads. What is added to a
//! request is two looks at the clock and a few atomic counters, and without the option nothing.

mod http; // one page, in one thread

use crate::command::cli::listen::Listen;
use crate::command::cli::usage;
use crate::fib::OUT_OF_RANGE;
use anyhow::Context;
use fibrpc::{HandlerError, RemoteError, Request, ServerStats, Serving};
use http::Page;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Upper bounds of the histogram, in seconds: three a decade, from what is next to nothing to
/// twice the time that `fibrpc call` waits.
const BUCKETS: [f64; 18] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0,
];

/// What may come of a request, besides the kinds that are first seen when they occur. Known from
/// the start, so that a rate begins at 0.
const OUTCOMES: [&str; 6] = [
    "answered",
    "expired",
    "unanswerable",
    RemoteError::INTERNAL,
    RemoteError::INVALID_ARGUMENT,
    OUT_OF_RANGE,
];

/// What a server has counted.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    handler_seconds: Histogram,
    busy: IntGauge,
    connections: IntCounter,
    connected: IntGauge,
    /// The server, once it has started.
    serving: OnceLock<Arc<Serving>>,
}

impl Metrics {
    /// Begins to count, and to serve what is counted, at `http://ADDRESS:PORT/metrics`.
    pub fn start(at: &Listen, workers: usize) -> anyhow::Result<Arc<Metrics>> {
        let listener = bind(at).map_err(|error| {
            usage(format!(
                "--metrics {at}: cannot listen there: {error}; name an address of this machine \
                 and a port that is free"
            ))
        })?;
        let address = listener.local_addr()?;
        let metrics = Arc::new(Metrics::new(workers)?);
        let page = Page {
            path: "/metrics",
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            text: {
                let metrics = Arc::clone(&metrics);
                move || metrics.text()
            },
        };
        page.serve("fibrpc-metrics", listener)
            .context("cannot start a thread for the metrics")?;
        log::info!("metrics at http://{address}/metrics");
        Ok(metrics)
    }

    fn new(workers: usize) -> prometheus::Result<Metrics> {
        let metrics = Metrics {
            registry: Registry::new(),
            requests: IntCounterVec::new(
                Opts::new(
                    "fibrpc_requests_total",
                    "Requests, by what came of them: answered, expired (the caller had given up), \
                     unanswerable (no reply_to), or the kind of the error that was sent.",
                ),
                &["outcome"],
            )?,
            handler_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "fibrpc_handler_seconds",
                    "How long the handler took for a request, in seconds.",
                )
                .buckets(BUCKETS.to_vec()),
            )?,
            busy: IntGauge::new(
                "fibrpc_workers_busy",
                "Workers whose handler is at work on a request.",
            )?,
            connections: IntCounter::new(
                "fibrpc_connections_total",
                "Connections on which every worker has consumed; all but the first are reconnects.",
            )?,
            connected: IntGauge::new(
                "fibrpc_connected",
                "Whether every worker consumes on a connection now: 1 or 0.",
            )?,
            serving: OnceLock::new(),
        };
        let pool = IntGauge::new("fibrpc_workers", "Requests that may be executed at a time.")?;
        pool.set(i64::try_from(workers).unwrap_or(i64::MAX));
        let build = IntGauge::with_opts(
            Opts::new("fibrpc_build_info", "Which fibrpc this is; always 1.")
                .const_label("version", env!("CARGO_PKG_VERSION"))
                .const_label(
                    "commit",
                    env!("FIBRPC_COMMIT").trim_matches([' ', '(', ')']),
                ),
        )?;
        build.set(1);
        for outcome in OUTCOMES {
            metrics.requests.with_label_values(&[outcome]);
        }
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.handler_seconds.clone()))?;
        registry.register(Box::new(pool))?;
        registry.register(Box::new(metrics.busy.clone()))?;
        registry.register(Box::new(metrics.connections.clone()))?;
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(build))?;
        Ok(metrics)
    }

    /// Has what the library counts told from now on.
    pub fn watch(&self, serving: &Arc<Serving>) {
        let _ = self.serving.set(Arc::clone(serving));
    }

    /// Everything in Prometheus's text format.
    /// Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.
    fn text(&self) -> String {
        // While it still connects, it has done nothing.
        let stats = self.serving.get().map(|serving| serving.stats());
        self.take_over(stats.unwrap_or_default());
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_else(|error| {
                log::warn!("cannot write the metrics: {error}");
                String::new()
            })
    }

    /// Brings what the library counts up to date. One thread does that, so that no step of a
    /// counter is made twice.
    fn take_over(&self, stats: ServerStats) {
        let raise =
            |counter: &IntCounter, to: u64| counter.inc_by(to.saturating_sub(counter.get()));
        for (outcome, count) in [
            ("answered", stats.answered),
            ("expired", stats.expired),
            ("unanswerable", stats.unanswerable),
            // More than our handlers return: a panic, a reply that cannot be sent.
            (RemoteError::INTERNAL, stats.internal),
        ] {
            raise(&self.requests.with_label_values(&[outcome]), count);
        }
        raise(&self.connections, stats.connections);
        self.connected.set(i64::from(stats.connected));
    }

    /// Counts an error of a handler, unless the library does.
    fn refused(&self, error: &HandlerError) {
        if let Some(error) = error.downcast_ref::<RemoteError>()
            && error.kind() != RemoteError::INTERNAL
        {
            self.requests.with_label_values(&[error.kind()]).inc();
        }
    }
}

/// Listens at an address, or at every one that the machine has.
fn bind(at: &Listen) -> io::Result<TcpListener> {
    if !at.host.is_empty() {
        return TcpListener::bind((at.host.as_str(), at.port));
    }
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, at.port)).or_else(|error| match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::PermissionDenied => Err(error),
        // A machine without IPv6.
        _ => TcpListener::bind((Ipv4Addr::UNSPECIFIED, at.port)),
    })
}

/// A handler whose requests are counted, if anybody wants to know.
pub fn counted<R>(
    metrics: Option<Arc<Metrics>>,
    handler: impl Fn(&Request) -> Result<R, HandlerError> + Send + Sync + 'static,
) -> impl Fn(&Request) -> Result<R, HandlerError> + Send + Sync + 'static {
    move |request: &Request| {
        let Some(metrics) = &metrics else {
            return handler(request);
        };
        let _busy = Busy::new(metrics);
        let result = handler(request);
        if let Err(error) = &result {
            metrics.refused(error);
        }
        result
    }
}

/// A handler at work, until it returns or panics.
struct Busy<'m> {
    metrics: &'m Metrics,
    since: Instant,
}

impl Busy<'_> {
    fn new(metrics: &Metrics) -> Busy<'_> {
        metrics.busy.inc();
        Busy {
            metrics,
            since: Instant::now(),
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let took = self.since.elapsed();
        self.metrics.handler_seconds.observe(took.as_secs_f64());
        self.metrics.busy.dec();
    }
}
