//! The first message of a stream and its answer, each with its length before it.

use crate::headers::ConnectRequest;
use http::{HeaderMap, HeaderValue, header};
use prost::Message;
use quinn::{RecvStream, SendStream};
use std::io;
use tombolo_proto::tombolo::v1::{StreamOpen, StreamStatus};

/// Longest of either.
const FRAME_MAX: usize = 16 * 1024;

fn text(value: Option<&HeaderValue>) -> String {
    value
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

async fn write(send: &mut SendStream, message: &impl Message) -> io::Result<()> {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let frame = [&length.to_be_bytes()[..], &body].concat();
    send.write_all(&frame).await.map_err(io::Error::from)
}

async fn read<M: Message + Default>(recv: &mut RecvStream) -> io::Result<M> {
    let failed =
        |error: quinn::ReadExactError| io::Error::new(io::ErrorKind::UnexpectedEof, error.to_string());
    let mut length = [0; 4];
    recv.read_exact(&mut length).await.map_err(failed)?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > FRAME_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first message is too long",
        ));
    }
    let mut body = vec![0; length];
    recv.read_exact(&mut body).await.map_err(failed)?;
    M::decode(body.as_slice()).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

pub(crate) async fn write_open(send: &mut SendStream, request: &ConnectRequest) -> io::Result<()> {
    let open = StreamOpen {
        authority: request.authority.to_string(),
        baggage: text(request.baggage.as_ref()),
        forwarded: text(request.forwarded.as_ref()),
        traceparent: text(request.traceparent.as_ref()),
    };
    write(send, &open).await
}

/// What a stream is for.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) authority: String,
    pub(crate) headers: HeaderMap,
}

pub(crate) async fn read_open(recv: &mut RecvStream) -> io::Result<Opened> {
    let open: StreamOpen = read(recv).await?;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (crate::headers::BAGGAGE, open.baggage),
        (header::FORWARDED, open.forwarded),
        (crate::headers::TRACEPARENT, open.traceparent),
    ] {
        if let (false, Ok(value)) = (value.is_empty(), HeaderValue::try_from(value)) {
            headers.insert(name, value);
        }
    }
    Ok(Opened {
        authority: open.authority,
        headers,
    })
}

pub(crate) async fn write_status(
    send: &mut SendStream,
    code: u16,
    baggage: Option<&HeaderValue>,
) -> io::Result<()> {
    let status = StreamStatus {
        code: code.into(),
        baggage: text(baggage),
    };
    write(send, &status).await
}

/// The code; anything that is none is 503.
pub(crate) async fn read_status(recv: &mut RecvStream) -> io::Result<u16> {
    let status: StreamStatus = read(recv).await?;
    Ok(u16::try_from(status.code).unwrap_or(503))
}
