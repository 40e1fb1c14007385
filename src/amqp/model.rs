//! A model of what threads meet at and of what they ask the kernel for, so that shuttle can search
//! the schedules of the code that uses them. In tests with `--cfg shuttle` alone:
//! [`crate::amqp::sync`] then has these names in place of the real ones.
//!
//! Everything that the model does may be relied on by nobody beyond what is promised:
//!
//! - **Time.** A timed wait does not end before its time, and may end however late. A thread may be
//!   stopped for however long, so that any time passes between two looks at the clock. A test
//!   chooses ([`Time`]): if time stands still, no timed wait ends but a pause, so whoever is
//!   forgotten sleeps for ever and shuttle says "deadlock"; if it passes, a wait may be over at any
//!   moment.
//! - **The far end**, once closed, sends nothing. What is written to it is taken or refused, as
//!   chance has it; when there is no room, it is refused.
//! - **A socket.** A read returns one byte at least, of those that are there, or that there are
//!   none. A write takes the first bytes, one at least if there is room; when it has taken less
//!   than it was given, there may be room or not.
//! - **A poll**, as of epoll(7): what is armed is reported once its condition holds, and, with
//!   one-shot, is then not armed any more. With edge, the condition has to come about anew, or to
//!   hold when it is armed. A poll is readable itself while something in it waits to be taken, and
//!   an event that nobody takes is not told of again.
//! - **Memory** is sequentially consistent, which is more than is promised: shuttle knows no weaker
//!   one. So it does not judge `Ordering`.
//!
//! In reading order:

pub(crate) mod kernel; // what a socket and a poll do; pure
pub(crate) mod world; // who waits, and what time it is

pub(crate) mod chance; // random numbers, and the order of a map
pub(crate) mod channel; // crossbeam's
pub(crate) mod net; // a socket, and its far end
pub(crate) mod poll; // mio's

pub(crate) mod amiquip; // its I/O thread

pub(crate) mod explore; // the search
