//! What all threads of an execution share: who waits, and what time it is.

use crate::amqp::model::kernel::Kernel;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync as model;
use std::cell::RefCell;
use std::ops::{Add, AddAssign, Sub};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LockResult, PoisonError};
use std::time::Duration;

/// What a test wants of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Time {
    /// No wait is over because of its time, but for a pause (`Receiver::recv_deadline`). So whatever
    /// is done is done because somebody was woken for it.
    StandsStill,
    /// Any timed wait may be over at any moment.
    Passes,
}

/// Deadlines beyond this are not waited for.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// How far the clock goes on at most between two looks at it, if it does.
const STOPPED_MAX: Duration = Duration::from_millis(8);

/// What all threads of an execution share.
pub(crate) struct World {
    kernel: model::Mutex<Kernel>,
    /// Something has changed for one who waits in the kernel.
    changed: Condvar,
    time: Time,
    /// The time, in nanoseconds.
    now: AtomicU64,
    timers: model::Mutex<Vec<Timer>>,
    /// There is a timer, or the execution is over.
    timed: model::Condvar,
    over: AtomicBool,
}

struct Timer {
    at: u64,
    sleeper: Arc<model::Condvar>,
}

thread_local! {
    /// All threads of an execution are coroutines of one.
    static WORLD: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
}

impl World {
    /// Runs `body` in a world of its own.
    pub fn run(time: Time, body: impl FnOnce()) {
        let world = Arc::new(World {
            kernel: model::Mutex::default(),
            changed: Condvar::new(),
            time,
            now: AtomicU64::new(0),
            timers: model::Mutex::default(),
            timed: model::Condvar::new(),
            over: AtomicBool::new(false),
        });
        WORLD.set(Some(Arc::clone(&world)));
        let clock = (time == Time::Passes).then(|| {
            let world = Arc::clone(&world);
            shuttle::thread::spawn(move || world.pass_time())
        });
        body();
        let timers = world.timers.lock().unwrap_or_else(PoisonError::into_inner);
        world.over.store(true, Ordering::Relaxed);
        world.timed.notify_all();
        drop(timers);
        if let Some(clock) = clock {
            clock.join().unwrap();
        }
    }

    /// That of the execution.
    pub fn get() -> Arc<World> {
        WORLD.with_borrow(|world| Arc::clone(world.as_ref().expect("an execution is running")))
    }

    /// Does something in the kernel: at once, and after any other thread has done something.
    pub fn enter<T>(&self, action: impl FnOnce(&mut Kernel) -> T) -> T {
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let done = action(&mut kernel);
        if kernel.waiting > 0 {
            self.changed.notify_all();
        }
        done
    }

    /// Waits in the kernel until there is an answer, or that long; `None` for ever.
    pub fn wait<T>(
        &self,
        time: Option<Duration>,
        mut question: impl FnMut(&mut Kernel) -> Option<T>,
    ) -> Option<T> {
        let until = time.map(|time| Instant::now() + time);
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(answer) = question(&mut kernel) {
                return Some(answer);
            }
            let left = until.map(|until| until.0.saturating_sub(self.peek()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            let left = left.unwrap_or(Duration::MAX);
            kernel.waiting += 1;
            kernel = self
                .changed
                .wait_timeout(kernel, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            kernel.waiting -= 1;
        }
    }

    pub fn stands_still(&self) -> bool {
        self.time == Time::StandsStill
    }

    fn peek(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::Relaxed))
    }

    /// The time goes on by that much.
    pub fn advance(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap();
        self.now.fetch_add(nanos, Ordering::Relaxed);
    }

    /// The clock: whenever it is its turn, the next timer may be due.
    fn pass_time(&self) {
        let lock = || self.timers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut timers = lock();
        while !self.over.load(Ordering::Relaxed) {
            let Some(next) = timers.iter().map(|timer| timer.at).min() else {
                timers = self.timed.wait(timers).unwrap();
                continue;
            };
            // Seldom enough for the others to get anywhere.
            if thread_rng().gen_ratio(1, 16) {
                self.now.fetch_max(next, Ordering::Relaxed);
                let now = self.now.load(Ordering::Relaxed);
                // It stays a timer until its sleeper has removed it, who may not sleep yet.
                for due in timers.iter().filter(|timer| timer.at <= now) {
                    due.sleeper.notify_all();
                }
            }
            drop(timers);
            shuttle::thread::yield_now();
            timers = lock();
        }
    }
}

/// As [`std::sync::Condvar`].
pub(crate) struct Condvar(Arc<model::Condvar>);

impl Condvar {
    pub fn new() -> Condvar {
        Condvar(Arc::new(model::Condvar::new()))
    }

    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    pub fn notify_all(&self) {
        self.0.notify_all();
    }

    pub fn wait<'a, T>(
        &self,
        guard: model::MutexGuard<'a, T>,
    ) -> LockResult<model::MutexGuard<'a, T>> {
        self.0.wait(guard)
    }

    /// Whether its time is over, who waits sees on the clock.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: model::MutexGuard<'a, T>,
        time: Duration,
    ) -> LockResult<(model::MutexGuard<'a, T>, ())> {
        let world = World::get();
        if world.stands_still() || time >= NEVER {
            return self
                .0
                .wait(guard)
                .map(|guard| (guard, ()))
                .map_err(|error| PoisonError::new((error.into_inner(), ())));
        }
        let at = world.peek() + time;
        let timer = Timer {
            at: u64::try_from(at.as_nanos()).unwrap(),
            sleeper: Arc::clone(&self.0),
        };
        let at = timer.at;
        let lock = || world.timers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut timers = lock();
        timers.push(timer);
        world.timed.notify_all();
        drop(timers);
        let guard = self.0.wait(guard).unwrap_or_else(PoisonError::into_inner);
        let mut timers = lock();
        let is_ours = |timer: &Timer| timer.at == at && Arc::ptr_eq(&timer.sleeper, &self.0);
        let index = timers
            .iter()
            .position(is_ours)
            .expect("nobody else removes it");
        timers.swap_remove(index);
        Ok((guard, ()))
    }
}

/// As [`std::time::Instant`]: since the execution began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    pub fn now() -> Instant {
        let world = World::get();
        if thread_rng().gen_ratio(1, 4) {
            world.advance(STOPPED_MAX.mul_f64(thread_rng().gen_range(0.0..1.0)));
        }
        Instant(world.peek())
    }

    pub fn elapsed(&self) -> Duration {
        Instant::now().duration_since(*self)
    }

    pub fn duration_since(&self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub fn saturating_duration_since(&self, earlier: Instant) -> Duration {
        self.duration_since(earlier)
    }

    pub fn checked_sub(&self, time: Duration) -> Option<Instant> {
        self.0.checked_sub(time).map(Instant)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, time: Duration) -> Instant {
        Instant(self.0 + time)
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, time: Duration) {
        self.0 += time;
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;

    fn sub(self, earlier: Instant) -> Duration {
        self.duration_since(earlier)
    }
}
