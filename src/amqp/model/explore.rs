//! The search: schedules by chance, and by PCT, until the time is over.
//!
//! Variables of the environment, which `scripts/prove` sets:
//!
//! - `PROVE_SECONDS`: for how long each test searches; 1 by default.
//! - `PROVE_FROM`: the first seed; 1 by default, so that each run searches the same.
//! - `PROVE_SEED`: runs one seed alone, `random:7` or `pct:7`, as a failure has told it.

use crate::amqp::model::world::{Time, World};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

/// How many schedules come of a seed. The first of PCT only counts the steps.
const SCHEDULES: usize = 50;

/// How often PCT takes the turn from a thread that would go on, and one more.
const DEPTH: usize = 3;

/// What needs more steps than this goes round in circles.
const STEPS_MAX: usize = 200_000;

/// Both kinds of schedules, in turn.
const KINDS: [&str; 2] = ["random", "pct"];

/// Runs `body` in one schedule after the other. Prints the seed of the first one that fails, and
/// fails.
pub(crate) fn explore(test: &str, time: Time, body: fn()) {
    if let Ok(seed) = env::var("PROVE_SEED") {
        let (kind, seed) = seed.split_once(':').expect("PROVE_SEED=random:7");
        let seed = seed.parse().expect("PROVE_SEED=random:7");
        run(test, kind, seed, time, body);
        return;
    }
    let number = |name, default| match env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    };
    let (time_max, from) = (
        number("PROVE_SECONDS", 1.0),
        number("PROVE_FROM", 1.0) as u64,
    );
    let (began, mut count) = (Instant::now(), 0);
    for seed in from.. {
        for kind in KINDS {
            run(test, kind, seed, time, body);
            count += SCHEDULES;
        }
        if began.elapsed() >= Duration::from_secs_f64(time_max) {
            break;
        }
    }
    println!(
        "{test}: {count} schedules in {:.1} s",
        began.elapsed().as_secs_f64()
    );
}

fn run(test: &str, kind: &str, seed: u64, time: Time, body: fn()) {
    match kind {
        "random" => {
            let scheduler = RandomScheduler::new_from_seed(seed, SCHEDULES);
            run_by(scheduler, test, kind, seed, time, body);
        }
        "pct" => {
            let scheduler = PctScheduler::new_from_seed(seed, DEPTH, SCHEDULES);
            run_by(scheduler, test, kind, seed, time, body);
        }
        _ => panic!("a seed is random:7 or pct:7"),
    }
}

fn run_by(
    scheduler: impl Scheduler + 'static,
    test: &str,
    kind: &str,
    seed: u64,
    time: Time,
    body: fn(),
) {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    // The seed says the same in fewer letters.
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    let runner = Runner::new(scheduler, config);
    let result = catch_unwind(AssertUnwindSafe(|| {
        runner.run(move || World::run(time, body));
    }));
    if let Err(panic) = result {
        println!(
            "{test}: it fails with the seed {kind}:{seed}; scripts/prove {kind}:{seed} {test}"
        );
        resume_unwind(panic);
    }
}
