//! A TCP application for tests: servers and clients whose behaviour at the edges of TCP is exactly known.
//!
//! `serve MODE PORT`: `echo`, `sum` (reads to the end, answers length and checksum), `banner` (speaks first, then
//! echoes), `reset` (resets after the first byte), `source` (first line names a number of bytes to send), `slow`
//! (reads 64 KiB per 100 ms and then answers the sum), `http` (one GET a connection).
//! `call MODE HOST PORT [N]`: `sum` (sends N bytes, half-closes, checks the answer), `source` (asks for N bytes and
//! checks them), `echo` (N bytes both ways), `banner`, `reset` (says what ended the connection), `hold` (N connections,
//! one byte each way, then waits for a line on stdin and checks all again), `connect` (prints how connect() ended),
//! `idle` (N connections that say nothing, until stdin closes), `drip` (a byte each way every N ms on one connection, until stdin closes),
//! `steady` (N connections, a byte each way on one after the other, again and again until stdin closes; prints how
//! often, and the longest wait in ms), `load` (HTTP GET on a new connection N times a second until stdin closes; a line per request: start in Unix ms,
//! duration in ms, `ok` or the error), `keep` (the same on one connection that is kept alive; a new one only after an
//! error), `blast` (sends stdin as it is, then reads to the end).
#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::{
    io::{BufRead as _, BufReader, Error, Read, Result, Write as _},
    net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs as _},
    thread,
    time::{Duration, Instant},
};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve", mode, port] => serve(mode, port.parse().map_err(Error::other)?),
        ["call", mode, host, port, rest @ ..] => {
            let count = rest.first().map_or(Ok(1), |n| n.parse()).map_err(Error::other)?;
            call(mode, host, port.parse().map_err(Error::other)?, count)
        }
        _ => Err(Error::other(
            "usage: tombolo-peer serve MODE PORT | call MODE HOST PORT [N]",
        )),
    }
}

fn serve(mode: &str, port: u16) -> Result<()> {
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    for socket in listener.incoming() {
        let (socket, mode) = (socket?, mode.to_owned());
        thread::Builder::new().stack_size(512 << 10).spawn(move || {
            let _ = answer(&mode, socket);
        })?;
    }
    Ok(())
}

fn answer(mode: &str, mut socket: TcpStream) -> Result<()> {
    socket.set_nodelay(true)?;
    match mode {
        "echo" => echo(&mut socket),
        "sum" => {
            let (length, sum) = drain(&mut socket, Duration::ZERO)?;
            writeln!(socket, "{length} {sum:016x}")
        }
        "slow" => {
            let (length, sum) = drain(&mut socket, Duration::from_millis(100))?;
            writeln!(socket, "{length} {sum:016x}")
        }
        "banner" => {
            socket.write_all(b"220 ready\n")?;
            echo(&mut socket)
        }
        "reset" => {
            socket.read_exact(&mut [0])?;
            nix::sys::socket::setsockopt(
                &socket,
                nix::sys::socket::sockopt::Linger,
                &nix::libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                },
            )
            .map_err(Error::from)
        }
        "http" => {
            let mut lines = BufReader::new(socket.try_clone()?).lines();
            while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
            socket.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
        }
        "source" => {
            let mut line = String::new();
            BufReader::new(socket.try_clone()?).read_line(&mut line)?;
            send(&mut socket, line.trim().parse().map_err(Error::other)?)?;
            socket.shutdown(Shutdown::Write)
        }
        other => Err(Error::other(format!("no mode {other}"))),
    }
}

fn echo(socket: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match socket.read(&mut buffer)? {
            0 => return socket.shutdown(Shutdown::Write),
            n => socket.write_all(&buffer[..n])?,
        }
    }
}

fn call(mode: &str, host: &str, port: u16, count: u64) -> Result<()> {
    let start = Instant::now();
    let address = (host, port)
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| Error::other("no address"))?;
    if mode == "load" {
        return load(host, address, count);
    }
    if mode == "keep" {
        return keep(host, address, count);
    }
    if mode == "idle" {
        let idle: Vec<_> = (0..count).map(|_| TcpStream::connect(address)).collect();
        std::io::stdin().read_to_end(&mut Vec::new())?;
        println!("{} were accepted", idle.iter().flatten().count());
        return Ok(());
    }
    let connected = TcpStream::connect_timeout(&address, Duration::from_secs(15));
    if mode == "connect" {
        let how = match &connected {
            Ok(_) => "connected".to_owned(),
            Err(error) => error.raw_os_error().map_or_else(|| error.to_string(), errno_name),
        };
        println!("{how} after {} ms", start.elapsed().as_millis());
        return Ok(());
    }
    let mut socket = connected?;
    socket.set_nodelay(true)?;
    match mode {
        "blast" => {
            std::io::copy(&mut std::io::stdin(), &mut socket)?;
            drain(&mut socket, Duration::ZERO).map(drop)
        }
        "sum" => {
            let sent = send(&mut socket, count)?;
            socket.shutdown(Shutdown::Write)?;
            let mut line = String::new();
            socket.read_to_string(&mut line)?;
            expect(
                line.trim() == format!("{count} {sent:016x}"),
                &format!("sent {count} {sent:016x}, they saw {line:?}"),
            )
        }
        "source" => {
            writeln!(socket, "{count}")?;
            let (length, sum) = drain(&mut socket, Duration::ZERO)?;
            let (mut check, mut pattern) = (Sum::default(), Pattern::new());
            let mut left = count;
            while left > 0 {
                let chunk = pattern.next(left);
                check.add(chunk);
                left -= chunk.len() as u64;
            }
            expect(
                length == count && sum == check.0,
                &format!("asked for {count}, got {length}"),
            )
        }
        "echo" => {
            let mut writer = socket.try_clone()?;
            let sender = thread::spawn(move || -> Result<u64> {
                let sum = send(&mut writer, count)?;
                writer.shutdown(Shutdown::Write)?;
                Ok(sum)
            });
            let (length, sum) = drain(&mut socket, Duration::ZERO)?;
            let sent = sender.join().map_err(|_| Error::other("sender"))??;
            expect(
                length == count && sum == sent,
                &format!("sent {count}, got {length} back"),
            )
        }
        "banner" => {
            let mut line = String::new();
            BufReader::new(socket.try_clone()?).read_line(&mut line)?;
            expect(line == "220 ready\n", &format!("banner {line:?}"))
        }
        "reset" => {
            socket.write_all(b"x")?;
            let end = socket.read(&mut [0]);
            println!(
                "{}",
                end.map_or_else(
                    |error| error.raw_os_error().map_or_else(String::new, errno_name),
                    |n| format!("{n} bytes")
                )
            );
            Ok(())
        }
        "drip" => {
            let (mut all, stop) = ([socket], stdin_closes());
            let mut bytes = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                touch(&mut all)?;
                bytes += 1;
                thread::sleep(Duration::from_millis(count));
            }
            println!("dripped {bytes}");
            Ok(())
        }
        "hold" => {
            let mut all = vec![socket];
            for _ in 1..count {
                all.push(TcpStream::connect_timeout(&address, Duration::from_secs(15))?);
            }
            touch(&mut all)?;
            println!("holding {count}");
            std::io::stdin().read_line(&mut String::new())?;
            touch(&mut all)
        }
        "steady" => {
            let mut all = vec![socket];
            for _ in 1..count {
                all.push(TcpStream::connect_timeout(&address, Duration::from_secs(15))?);
            }
            let stop = stdin_closes();
            println!("holding {count}");
            let (mut rounds, mut worst) = (0, Duration::ZERO);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for socket in &mut all {
                    let begun = Instant::now();
                    socket.set_nodelay(true)?;
                    touch(std::slice::from_mut(socket))?;
                    worst = worst.max(begun.elapsed());
                }
                rounds += 1;
            }
            println!("steady {rounds} worst {}", worst.as_millis());
            Ok(())
        }
        other => Err(Error::other(format!("no mode {other}"))),
    }?;
    println!("ok {count} in {} ms", start.elapsed().as_millis());
    Ok(())
}

/// Becomes true when stdin ends, or a line comes.
fn stdin_closes() -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = std::sync::Arc::clone(&stop);
    thread::spawn(move || {
        let _ = std::io::stdin().read_line(&mut String::new());
        told.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    stop
}

fn load(host: &str, address: std::net::SocketAddr, per_second: u64) -> Result<()> {
    let stop = stdin_closes();
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let begun = Instant::now();
    let mut running = Vec::new();
    for n in 0u32.. {
        if stop.load(std::sync::atomic::Ordering::Relaxed) {
            break;
        }
        let due = Duration::from_secs(1) * n / u32::try_from(per_second.max(1)).unwrap_or(u32::MAX);
        thread::sleep(due.saturating_sub(begun.elapsed()));
        let request = request.clone();
        running.push(thread::Builder::new().stack_size(128 << 10).spawn(move || {
            let at = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default()
                .as_millis();
            let begun = Instant::now();
            let result = get(address, &request);
            let how = result.map_or_else(|error| error.to_string().replace(' ', "_"), |()| "ok".to_owned());
            println!("{at} {} {how}", begun.elapsed().as_millis());
        })?);
    }
    for thread in running {
        let _ = thread.join();
    }
    Ok(())
}

fn keep(host: &str, address: std::net::SocketAddr, per_second: u64) -> Result<()> {
    let stop = stdin_closes();
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let begun = Instant::now();
    let mut kept = None;
    for n in 0u32.. {
        if stop.load(std::sync::atomic::Ordering::Relaxed) {
            break;
        }
        let due = Duration::from_secs(1) * n / u32::try_from(per_second.max(1)).unwrap_or(u32::MAX);
        thread::sleep(due.saturating_sub(begun.elapsed()));
        let at = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        let begun = Instant::now();
        let how = match get_kept(&mut kept, address, &request) {
            Ok(()) => "ok".to_owned(),
            Err(error) => {
                kept = None;
                error.to_string().replace(' ', "_")
            }
        };
        println!("{at} {} {how}", begun.elapsed().as_millis());
    }
    Ok(())
}

/// One request on the connection that is kept, or on a new one where there is none.
fn get_kept(
    kept: &mut Option<BufReader<TcpStream>>,
    address: std::net::SocketAddr,
    request: &str,
) -> Result<()> {
    let reader = match kept {
        Some(reader) => reader,
        None => {
            let socket = TcpStream::connect_timeout(&address, Duration::from_secs(12))?;
            socket.set_read_timeout(Some(Duration::from_secs(12)))?;
            socket.set_nodelay(true)?;
            kept.insert(BufReader::new(socket))
        }
    };
    reader.get_mut().write_all(request.as_bytes())?;
    let (mut status, mut length) = (String::new(), 0);
    reader.read_line(&mut status)?;
    expect(status.starts_with("HTTP/1.1 200"), "no answer")?;
    loop {
        let mut line = String::new();
        expect(reader.read_line(&mut line)? > 0, "cut in its head")?;
        if line.trim().is_empty() {
            break;
        }
        let line = line.to_ascii_lowercase();
        if let Some(text) = line.strip_prefix("content-length:") {
            length = text.trim().parse().map_err(Error::other)?;
        }
    }
    reader.read_exact(&mut vec![0; length])
}

fn get(address: std::net::SocketAddr, request: &str) -> Result<()> {
    let mut socket = TcpStream::connect_timeout(&address, Duration::from_secs(12))?;
    socket.set_read_timeout(Some(Duration::from_secs(12)))?;
    socket.write_all(request.as_bytes())?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    expect(answer.starts_with("HTTP/1.1 200"), "no answer")
}

fn touch(all: &mut [TcpStream]) -> Result<()> {
    for socket in all {
        socket.write_all(b"x")?;
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        expect(&byte == b"x", "another byte came back")?;
    }
    Ok(())
}

fn expect(holds: bool, otherwise: &str) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::other(otherwise))
    }
}

fn errno_name(errno: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}

/// FNV-1a over 8-byte words: order and content both count, and it keeps up with a fast connection.
struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// A long stream of bytes that repeats only after 2^32 blocks.
struct Pattern {
    block: Vec<u8>,
    state: u64,
}

impl Pattern {
    fn new() -> Self {
        Self {
            block: vec![0; 64 << 10],
            state: 88_172_645_463_325_252,
        }
    }

    fn next(&mut self, left: u64) -> &[u8] {
        for word in self.block.chunks_exact_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes());
        }
        let length = self.block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        &self.block[..length]
    }
}

fn send(socket: &mut TcpStream, count: u64) -> Result<u64> {
    let (mut sum, mut pattern, mut left) = (Sum::default(), Pattern::new(), count);
    while left > 0 {
        let chunk = pattern.next(left);
        sum.add(chunk);
        socket.write_all(chunk)?;
        left -= chunk.len() as u64;
    }
    Ok(sum.0)
}

fn drain(socket: &mut TcpStream, pause: Duration) -> Result<(u64, u64)> {
    let (mut buffer, mut length, mut sum) = (vec![0; 64 << 10], 0, Sum::default());
    loop {
        match socket.read(&mut buffer)? {
            0 => return Ok((length, sum.0)),
            n => {
                sum.add(&buffer[..n]);
                length += n as u64;
            }
        }
        thread::sleep(pause);
    }
}
