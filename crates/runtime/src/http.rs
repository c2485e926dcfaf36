//! The read-only HTTP endpoints: metrics, readiness, debug. HTTP/1.1, GET only, loopback unless configured.

use crate::TaskGroup;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore};

/// Most connections of one endpoint at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;
/// A scraper that sends no complete request head for so long is cut.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Content type.
    pub content_type: &'static str,
    /// Body.
    pub body: String,
}

impl Answer {
    /// 200, text.
    pub fn text(body: impl Into<String>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "text/plain; charset=utf-8",
            body: body.into(),
        }
    }

    /// 200, JSON.
    pub fn json(body: impl Into<String>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "application/json",
            body: body.into(),
        }
    }

    /// Another status, text.
    pub fn status(status: StatusCode, body: impl Into<String>) -> Self {
        Self {
            status,
            ..Self::text(body)
        }
    }
}

/// Answers a path (query excluded); `None` is 404.
pub type Route = dyn Fn(&str) -> Option<Answer> + Send + Sync;

/// Binds `address` and serves `route` until the group stops. Returns the bound address.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(address: SocketAddr, route: Arc<Route>, tasks: &TaskGroup) -> std::io::Result<SocketAddr> {
    serve_on(TcpListener::bind(address).await?, route, tasks)
}

/// Serves `route` on a listener until the group stops. Returns its address.
///
/// # Errors
/// When the listener has no address.
pub fn serve_on(listener: TcpListener, route: Arc<Route>, tasks: &TaskGroup) -> std::io::Result<SocketAddr> {
    let bound = listener.local_addr()?;
    let limit = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let group = tasks.clone();
    tasks.spawn_until_stopped("http endpoint", async move {
        loop {
            let Ok(permit) = Arc::clone(&limit).acquire_owned().await else {
                return;
            };
            let (socket, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors: wait instead of spinning.
                    tracing::debug!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let route = Arc::clone(&route);
            group.spawn_until_stopped("http connection", async move {
                let service = service_fn(move |request| {
                    let answer = respond(&request, route.as_ref());
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(socket), service);
                let _ = connection.await; // a scraper that went away is no event
                drop(permit);
            });
        }
    });
    Ok(bound)
}

fn respond(request: &Request<Incoming>, route: &Route) -> Response<Full<Bytes>> {
    let answer = if *request.method() == Method::GET || *request.method() == Method::HEAD {
        route(request.uri().path()).unwrap_or_else(|| Answer::status(StatusCode::NOT_FOUND, "not found\n"))
    } else {
        Answer::status(StatusCode::METHOD_NOT_ALLOWED, "read only\n")
    };
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(answer.content_type),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn answers_and_refuses() {
        let tasks = TaskGroup::new("test");
        let route: Arc<Route> = Arc::new(|path| (path == "/metrics").then(|| Answer::text("x 1\n")));
        let address = serve("127.0.0.1:0".parse().unwrap(), route, &tasks)
            .await
            .unwrap();
        let get = |path| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        assert!(ask(address, &get("/metrics?a=b")).await.contains("x 1"));
        assert!(ask(address, &get("/none")).await.starts_with("HTTP/1.1 404"));
        let post = "POST /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        assert!(ask(address, post).await.starts_with("HTTP/1.1 405"));
        assert!(ask(address, "garbage\r\n\r\n").await.starts_with("HTTP/1.1 400"));
        tasks.stop();
        assert_eq!(
            tasks.drain(Duration::from_secs(5)).await,
            crate::Drained::Complete
        );
    }
}
