//! Enroll and Renew: how a host gets its certificates.

use super::gate::Gate;
use super::{EnrolRequest, SessionSettings, blocking, too_old};
use identity::{Fingerprint, PeerCertificate, Standing, Token};
use model::{Code, HostId, Problem};
use protocol::v0::{self, enrollment_server::Enrollment};
use protocol::wire::{tame, to_status};
use tonic::{Request, Response, Status};

pub(super) struct EnrollmentService {
    settings: SessionSettings,
}

impl EnrollmentService {
    pub(super) fn new(settings: SessionSettings) -> EnrollmentService {
        EnrollmentService { settings }
    }

    fn issue(&self, request: &[u8], host: HostId) -> Result<(Vec<u8>, PeerCertificate), Problem> {
        let serial = self.settings.random()?;
        let made =
            self.settings.identity.issue_host_certificate(request, host, self.settings.now(), serial)?;
        let read = PeerCertificate::read(&made)?;
        Ok((made.to_vec(), read))
    }

    async fn enroll(&self, request: v0::EnrollRequest) -> Result<v0::EnrollReply, Problem> {
        let asked = EnrolRequest {
            token_hash: Token::hash_of(&request.token_secret),
            key: Fingerprint::of_request(&request.certificate_request)?,
            host_name: tame(&request.host_name),
            platform: tame(&request.platform),
            program_version: tame(&request.program_version),
            fresh: HostId(self.settings.random()?),
            now: self.settings.now(),
        };
        let register = self.settings.register.clone();
        let host = blocking(move || register.enrol(&asked)).await?;
        let certificate = self.grant(&request.certificate_request, host).await?;
        Ok(v0::EnrollReply {
            host: host.0.to_vec().into(),
            certificate: certificate.into(),
            addresses: self.settings.addresses.clone(),
            server_name: self.settings.server_name.clone(),
        })
    }

    async fn renew(&self, gate: Option<Gate>, request: v0::RenewRequest) -> Result<v0::RenewReply, Problem> {
        let shown = gate.and_then(|gate| gate.certificate).ok_or_else(|| {
            Problem::new(
                Code::Unauthorised,
                "A certificate is renewed by the host that holds it, and none was shown.",
            )
        })?;
        if shown.standing(self.settings.now()) == Standing::TooOld {
            return Err(too_old(&shown));
        }
        let (register, host) = (self.settings.register.clone(), shown.host);
        blocking(move || register.admit(&shown)).await?;
        let certificate = self.grant(&request.certificate_request, host).await?;
        Ok(v0::RenewReply { certificate: certificate.into(), addresses: self.settings.addresses.clone() })
    }

    async fn grant(&self, request: &[u8], host: HostId) -> Result<Vec<u8>, Problem> {
        let (der, certificate) = self.issue(request, host)?;
        let register = self.settings.register.clone();
        blocking(move || register.issued(&certificate)).await?;
        Ok(der)
    }
}

#[tonic::async_trait]
impl Enrollment for EnrollmentService {
    async fn enroll(&self, request: Request<v0::EnrollRequest>) -> Result<Response<v0::EnrollReply>, Status> {
        let reply = EnrollmentService::enroll(self, request.into_inner()).await;
        reply.map(Response::new).map_err(|problem| to_status(&problem))
    }

    async fn renew(&self, request: Request<v0::RenewRequest>) -> Result<Response<v0::RenewReply>, Status> {
        let gate = request.extensions().get::<Gate>().cloned();
        let reply = EnrollmentService::renew(self, gate, request.into_inner()).await;
        reply.map(Response::new).map_err(|problem| to_status(&problem))
    }
}
