//! The stored forms, frozen byte by byte.

use super::*;
use crate::domain::customer::Toggle;

fn accepted() -> Record<'static> {
    Record::Accepted(Accepted {
        endpoint: EndpointName::of(Plugin::new(12).unwrap()),
        plugin: Plugin::new(12).unwrap(),
        lane: LaneKey(0x0123_4567_89ab_cdef),
        key: 0xfeed,
        accepted_ms: 1_795_000_000_123,
        given_id: Some("e-1"),
        web_token: "wang",
        count: 1,
        messages: r#"{"type":"message"}"#,
    })
}

/// Version 1, frozen: a data directory written by any released version is read by every later one.
#[test]
fn the_first_version_of_the_format_is_read_as_it_was_written() {
    let mut frame = Vec::new();
    write_frame(&mut frame, 7, 300, 256, (7 << 20) + 5, &accepted().encode());
    let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, FROZEN_V1);
    let header = Header::read(&frame).unwrap();
    assert_eq!(header, Header { body_len: header.body_len, segment: 7, offset: 300, synced: 256, seq: (7 << 20) + 5 });
    assert_eq!(Record::decode(checked_body(&header, &frame).unwrap()).unwrap(), accepted());
}

const FROZEN_V1: &str = "4835520140000000070000002c010000000100000500700000000000bce73111010c0cef9bafcdf8acd1\
    9101edfe0000000000000000000000000000fbbcd9f29e340103652d310477616e6701127b2274797065223a226d65\
    7373616765227dbd72c3cf";

/// Each with its bytes of version 1, frozen as well.
#[test]
fn every_kind_of_record_is_written_and_read_as_in_the_first_version() {
    let customer = Customer {
        customer_token: Some("c".to_owned()),
        sdk_token: Some("s".to_owned()),
        h5push: Some(true),
        toggle: Toggle::Off,
        heard: 1_795_000_000,
        ..Customer::new("wang", Plugin::new(12).unwrap())
    };
    let retry = Retry {
        tries: 1,
        attempts: 2,
        refusals: 3,
        fixed: 4,
        singles: 5,
        singles_attempts: 6,
        singles_refusals: 7,
        ..Retry::default()
    };
    let Record::Accepted(event) = accepted() else { unreachable!() };
    let derived = Accepted { given_id: None, ..event.clone() };
    assert_eq!(derived.event_id(), "mid_0000000000000000000000000000feed");
    let dead = Dead {
        seq: 9,
        reason: DeathReason::Refused,
        buried_ms: 1_795_000_000_456,
        attempts: 5,
        event: Some(event),
        endpoint: EndpointName::DEFAULT,
        problem: Some("status 400"),
    };
    let plugin = Plugin::new(12).unwrap();
    let (web_token, name) = ("wang".to_owned(), "c".to_owned());
    let records = [
        (
            Record::Opened(Opened {
                identity: [3; 32],
                segment: 9,
                previous: Some((8, 77)),
                generation: 1,
                version: "0.1.0",
            }),
            "0003030303030303030303030303030303030303030303030303030303030303030901084d0105302e312e30",
        ),
        (
            accepted(),
            "010c0cef9bafcdf8acd19101edfe0000000000000000000000000000fbbcd9f29e340103652d310477616e6701127b2274797065223a226d657373616765227d",
        ),
        (
            Record::Accepted(derived),
            "010c0cef9bafcdf8acd19101edfe0000000000000000000000000000fbbcd9f29e34000477616e6701127b2274797065223a226d657373616765227d",
        ),
        (
            Record::Settled(Settled {
                lane: LaneKey(1),
                ending: Ending::Withdrawn,
                retry_is_over: true,
                second: 5,
                seqs: vec![1, 2, u64::MAX],
            }),
            "0201020105030102ffffffffffffffffff01",
        ),
        (Record::Deferred(DeferredRecord { lane: LaneKey(1), head: 3, retry, due_ms: 4 }), "0301030102030405060704"),
        (Record::State(StateChange::PutCustomer(customer)), "04000477616e670c010163010173010102c08df6d706"),
        (Record::State(StateChange::DropCustomer { plugin, web_token: web_token.clone() }), "04010c0477616e67"),
        (
            Record::State(StateChange::Name {
                kind: NameKind::Sdk,
                plugin,
                name: name.clone(),
                web_token: Some(web_token),
            }),
            "0402010c0163010477616e67",
        ),
        (
            Record::State(StateChange::Name { kind: NameKind::Customer, plugin, name, web_token: None }),
            "0402000c016300",
        ),
        (Record::State(StateChange::Setting { key: "a".to_owned(), value: Some("b".to_owned()) }), "04030161010162"),
        (Record::State(StateChange::Nonce { key: 7, until_s: 8 }), "04040708"),
        (Record::Sealed { events: 3 }, "0503"),
        (
            Record::Dead(dead),
            "060902c8bfd9f29e3405010c0cef9bafcdf8acd19101edfe0000000000000000000000000000fbbcd9f29e340103652d310477616e6701127b2274797065223a226d657373616765227d00010a73746174757320343030",
        ),
        (Record::Gone(vec!["3-17".parse().unwrap()]), "07010311"),
    ];
    for (record, frozen) in records {
        let bytes = record.encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, frozen, "{record:?}");
        assert_eq!(Record::decode(&bytes).unwrap(), record);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_noticed() {
    let mut frame = Vec::new();
    write_frame(&mut frame, 7, 0, 0, 1, &accepted().encode());
    for bit in 0..frame.len() * 8 {
        let mut flipped = frame.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let body = Header::read(&flipped).and_then(|header| checked_body(&header, &flipped).map(<[u8]>::to_vec));
        assert_eq!(body, None, "bit {bit}");
    }
}
