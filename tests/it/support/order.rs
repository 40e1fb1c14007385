//! What a broker can be told to do, as Erlang expressions for [`PrivateBroker::eval`]. rabbitmqctl
//! would do the same, after three seconds of a core for its start: while a test has a deadline
//! running, a busy machine has no time for that.
//!
//! [`PrivateBroker::eval`]: super::PrivateBroker::eval

const AUTH: &str = "rabbit_auth_backend_internal";

pub fn add_user(name: &str, password: &str) -> String {
    format!(r#"ok = {AUTH}:add_user(<<"{name}">>, <<"{password}">>, <<"test">>)"#)
}

pub fn change_password(name: &str, password: &str) -> String {
    format!(r#"ok = {AUTH}:change_password(<<"{name}">>, <<"{password}">>, <<"test">>)"#)
}

/// Which names a user may configure, write, read: regular expressions.
pub fn permit(name: &str, [configure, write, read]: [&str; 3]) -> String {
    format!(
        r#"ok = {AUTH}:set_permissions(<<"{name}">>, <<"/">>,
            <<"{configure}">>, <<"{write}">>, <<"{read}">>, <<"test">>)"#
    )
}

/// All of all.
pub const ALL: [&str; 3] = [".*", ".*", ".*"];

/// Takes what [`permit`] has given.
pub fn forbid(name: &str) -> String {
    format!(r#"ok = {AUTH}:clear_permissions(<<"{name}">>, <<"/">>, <<"test">>)"#)
}

/// How many channels a user may have.
pub fn limit_channels(name: &str, most: u32) -> String {
    let limits = format!(r#"{{\"max-channels\": {most}}}"#);
    format!(r#"ok = {AUTH}:set_user_limits(<<"{name}">>, <<"{limits}">>, <<"test">>)"#)
}

/// Closes every connection, with a reason that its client is told.
pub fn close_connections(reason: &str) -> String {
    format!(
        r#"[catch rabbit_networking:close_connection(Connection, "{reason}")
            || Connection <- rabbit_networking:connections()]"#
    )
}

/// What [`DELETE`] and others do to a `Queue`, done to that one, which must be there.
fn with_queue(name: &str, what: &str) -> String {
    format!("{{ok, Queue}} = {}, {what}", look_up(name))
}

/// The same, unless it is gone: with a broker just rebooted, say.
pub fn with_queue_if_there(name: &str, what: &str) -> String {
    let found = look_up(name);
    format!("case {found} of {{ok, Queue}} -> {what}; Gone -> Gone end")
}

fn look_up(name: &str) -> String {
    format!(r#"rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{name}">>))"#)
}

pub fn delete_queue(name: &str) -> String {
    with_queue(name, DELETE)
}

/// Deletes a `Queue`.
pub const DELETE: &str = r#"rabbit_amqqueue:delete(Queue, false, false, <<"test">>)"#;

/// Has the process of a queue stand still, so that the queue does not answer, or go on.
pub fn suspend_queue(name: &str) -> String {
    with_queue(name, "sys:suspend(amqqueue:get_pid(Queue))")
}

pub fn resume_queue(name: &str) -> String {
    with_queue(name, "sys:resume(amqqueue:get_pid(Queue))")
}

/// Deletes every callback queue, as no operator could: they are exclusive.
pub fn delete_callback_queues() -> String {
    format!(
        r#"[{DELETE} || Queue <- rabbit_amqqueue:list(<<"/">>),
            binary:match(element(4, element(2, Queue)), <<"amq.gen-">>) =/= nomatch]"#
    )
}

/// There is no memory left, or there is again: publishers are blocked meanwhile.
pub fn memory_alarm(is_on: bool) -> String {
    let watermark = if is_on { "0.0" } else { "0.8" };
    format!("ok = vm_memory_monitor:set_vm_memory_high_watermark({watermark})")
}

/// How many connections, queues, and channels there are: `{2, 2, 4}`.
pub const COUNT: &str = "{length(rabbit_networking:connections()), \
    length(rabbit_amqqueue:list()), length(rabbit_channel:list())}";
